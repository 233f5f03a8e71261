"""What every endpoint shares: the engine, the names it is served under, the rules for requests."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from miniserve.core import SamplingParams
from miniserve.engine.client import AsyncEngine
from miniserve.server.config import ServerConfig
from miniserve.server.errors import APIError
from miniserve.server.fields import FieldPolicy
from miniserve.server.metrics import ServerMetrics
from miniserve.server.reply import Header
from miniserve.server.sampling import SamplingRules

T = TypeVar("T")
_LONG_TEXT = 16_384  # characters; beyond, encoding takes milliseconds


class Service:
    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.model_names = config.served_model_names or (engine.info.model,)
        self.started = int(time.time())
        self.metrics = ServerMetrics(engine, self.model_names[0])
        self.fields = FieldPolicy()
        self.rules = SamplingRules(
            defaults=engine.generation_defaults.sampling,
            vocab_size=engine.info.vocab_size,
            max_prompts=config.max_prompts,
        )

    def header(self, prefix: str) -> Header:
        return Header(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self.model_names[0])

    def check_model(self, name: str | None) -> None:
        """Raises `APIError` 404. No name means the one model there is."""
        if name and name not in self.model_names:
            known = ", ".join(self.model_names)
            raise APIError(
                404,
                f"The model `{name[:200]}` does not exist; this server has {known}.",
                param="model",
                code="model_not_found",
            )

    def check_length(self, prompt_len: int, params: SamplingParams) -> None:
        """Raises `APIError` 400 with both numbers, and with the code that clients know it by."""
        limit = self.engine.info.max_model_len
        if prompt_len + (params.max_tokens != 0) > limit:
            raise APIError(
                400,
                f"This model's maximum context length is {limit} tokens. However, your prompt contains {prompt_len} "
                "input tokens, which leaves no room for output. Please shorten the prompt.",
                param="input_tokens",
                code="context_length_exceeded",
            )

    def check_alive(self) -> None:
        """Raises `APIError` 503 once the engine is dead."""
        if self.engine.dead:
            raise APIError(503, self.engine.dead)

    async def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Raises `InvalidRequest`."""
        encode = self.engine.tokenizer.encode
        num_chars = sum(map(len, texts))
        return await self.off_loop(num_chars, lambda: [encode(text, add_special_tokens) for text in texts])

    async def off_loop(self, num_chars: int, work: Callable[[], T]) -> T:
        """In a thread where the text is long, so that other requests' tokens go on flowing."""
        return work() if num_chars <= _LONG_TEXT else await asyncio.to_thread(work)
