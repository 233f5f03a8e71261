"""What becomes of request fields that the protocol types do not declare: refused, ignored, or warned about once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from miniserve.core import InvalidRequest

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 1000  # field names come from clients, so remembering them needs a bound

# They would change the answer and are not supported: refused unless null or one of the values that ask for nothing.
REFUSED: dict[str, tuple[object, ...]] = {
    # structured output
    "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "structural_tag": (), "json_schema": (), "regex": (), "ebnf": (),
    "grammar": ("",),
    # tools
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",), "web_search_options": (),
    # what may be sampled, and how
    "suffix": (), "bad_words": ([],), "allowed_token_ids": (), "logits_processors": ([],), "logit_processors": ([],),
    "custom_logit_processor": (), "use_beam_search": (False,), "num_beams": (1,), "early_stopping": (False,),
    "length_penalty": (1,), "no_repeat_ngram_size": (0,), "typical_p": (1,), "mirostat": (0,), "dry_multiplier": (0,),
    "xtc_probability": (0,), "thinking_token_budget": (), "repetition_detection": (), "vllm_xargs": ({},),
    "lora_path": (),
    # what goes in
    "prompt_embeds": (), "truncate_prompt_tokens": (), "audio": (), "mm_processor_kwargs": ({},),
    "reasoning_effort": (), "cache_salt": (), "kv_transfer_params": (), "priority": (0,),
    # what comes out
    "modalities": (["text"],), "prompt_logprobs": (), "logprob_token_ids": ([],), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "return_prompt_text": (False,), "include_reasoning": (True,),
}  # fmt: skip
REFUSED_IN_COMPLETIONS = REFUSED | {"max_completion_tokens": (), "top_logprobs": (0,), "messages": ()}
REFUSED_IN_CHAT = REFUSED | {"echo": (False,), "best_of": (1,), "prompt": ()}

_REMEDIES = {
    "reasoning_effort": 'use chat_template_kwargs, for example {"enable_thinking": false}, where the template knows it',
    "tool_choice": 'leave it out or send "none"',
    "num_beams": "leave it out or send 1",
    "max_completion_tokens": "use max_tokens",
    "top_logprobs": "use logprobs, which is a number here",
    "messages": "send a prompt, or ask /v1/chat/completions",
    "prompt": "send messages, or ask /v1/completions",
}

# Without effect on the answer by their nature, or only a hint; do_sample is judged together with temperature.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "verbosity", "parallel_tool_calls", "stream_interval", "request_id", "session_id", "do_sample",
    "truncation_side", "spaces_between_special_tokens",
})  # fmt: skip


class FieldPolicy:
    """Judges extra fields; remembers which it has warned about."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def check(self, extras: Mapping[str, Any], refused: Mapping[str, tuple[object, ...]]) -> None:
        """Raises `InvalidRequest` naming the first field that would change the answer and is not supported."""
        for name, value in extras.items():
            if name in refused:
                if value is not None and not any(_same(value, neutral) for neutral in refused[name]):
                    remedy = _REMEDIES.get(name, "leave it out")
                    raise InvalidRequest(f"{name} is not supported here; {remedy}.", name)
            elif name not in IGNORED:
                self._warn(name)

    def _warn(self, name: str) -> None:
        if name not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(name)
            logger.warning("Ignoring the unknown request field %.100r (said once per field).", name)


def _same(value: object, neutral: object) -> bool:
    """1 and 1.0 are the same number; True is no number."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
