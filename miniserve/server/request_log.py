"""One line in the log for each request that generates: what it took and how it ended, and no text unless asked for."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from miniserve.core import FinishReason
from miniserve.server.metrics import RequestMetrics

logger = logging.getLogger(__name__)


def log_request(
    answer_id: str,
    request_id: str,
    prompt_tokens: int,
    cached_tokens: int,
    records: Sequence[RequestMetrics],
    text: str | None,
) -> None:
    """ttft and tpot in seconds, of the first token and, as the mean of all sequences, of those after it; None where
    there was none. `text`: the prompts, where they may be logged."""
    sequences = [sequence for record in records for sequence in record.sequences]
    begun = [sequence for sequence in sequences if sequence.num_tokens]
    first = min((sequence.first_token for sequence in begun), default=None)
    later = sum(sequence.num_tokens - 1 for sequence in begun)
    waited = sum(sequence.last_token - sequence.first_token for sequence in begun)
    finish = Counter((sequence.finish or FinishReason.ABORT).value for sequence in sequences)
    fields: dict[str, Any] = {
        "id": answer_id,
        "request_id": request_id,
        "in": prompt_tokens,
        "cached": cached_tokens,
        "out": sum(sequence.num_tokens for sequence in sequences),
        "ttft": None if first is None else round(first - records[0].arrival, 4),
        "tpot": round(waited / later, 5) if later else None,
        "finish": "+".join(word if times == 1 else f"{times} {word}" for word, times in finish.items()),
    }
    if text is not None:
        fields["prompt"] = text
    # As JSON each is a field of its own (see `set_up_logging`).
    logger.info("%s", " ".join(f"{name}={_shown(value)}" for name, value in fields.items()), extra={"fields": fields})


def _shown(value: object) -> str:
    """As it is, or in quotes where a text would not be one word of the line."""
    text = str(value)
    return text if re.fullmatch(r"[\w.:+/-]+", text, re.ASCII) else json.dumps(text, ensure_ascii=False)
