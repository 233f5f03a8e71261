"""What every endpoint shares: the engine, the names it is served under, the rules for requests."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from miniserve.core import InvalidRequest, SamplingParams
from miniserve.engine.client import AsyncEngine
from miniserve.engine.validation import check_request
from miniserve.server.config import ServerConfig
from miniserve.server.errors import APIError
from miniserve.server.fields import FieldPolicy
from miniserve.server.generation import Generation
from miniserve.server.metrics import ServerMetrics
from miniserve.server.protocol import GenerationBody
from miniserve.server.reply import Header
from miniserve.server.sampling import SamplingRules
from miniserve.server.turns import Turns

T = TypeVar("T")
_LONG_TEXT = 16_384  # characters; beyond, encoding takes milliseconds
_VERY_LONG_TEXT = 262_144  # characters; beyond, it takes a good part of a second
_CALL = 64  # characters that could be encoded in the time that a call takes


class Service:
    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.model_names = config.served_model_names or (engine.info.model,)
        self.started = int(time.time())
        # As many more than run as keep the engine from ever waiting for the next.
        self.turns = Turns(2 * engine.info.max_num_seqs, config.max_queue)
        self.metrics = ServerMetrics(engine, self.turns, self.model_names[0])
        self.fields = FieldPolicy()
        self.rules = SamplingRules(
            defaults=engine.generation_defaults.sampling,
            vocab_size=engine.info.vocab_size,
            max_prompts=min(config.max_prompts, self.turns.most),
        )
        self._long = ThreadPoolExecutor(2, "long-text")
        self._very_long = ThreadPoolExecutor(1, "very-long-text")

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

    async def check_prompts(self, prompts: Sequence[list[int]], params: SamplingParams, body: GenerationBody) -> None:
        """All that can be said of prompts before any runs. Raises `InvalidRequest` or `APIError`."""
        for number, ids in enumerate(prompts):
            self.check_length(len(ids), params, body)
            if len(prompts) > 1:  # a single one is checked when it is handed to the engine
                check_request(ids, params, self.engine.info)
                if number % 32 == 31:
                    await asyncio.sleep(0)  # other requests' tokens go on flowing

    def check_length(self, prompt_len: int, params: SamplingParams, body: GenerationBody) -> None:
        """Raises `APIError` 400 with both numbers, and with the code that clients know it by."""
        limit = self.engine.info.max_model_len
        if prompt_len + (params.max_tokens != 0) > limit:
            raise self._too_long(
                f"your prompt contains {prompt_len} input tokens, which leaves no room for output. "
                "Please shorten the prompt."
            )
        field, asked = body.asked_tokens
        if asked is not None and prompt_len + asked > limit:
            raise self._too_long(
                f"you requested {prompt_len + asked} tokens: {prompt_len} in your prompt and {asked} of output. Please "
                f"shorten the prompt, or ask for at most {limit - prompt_len} tokens with {field}.",
                field,
            )

    def check_text(self, num_chars: int) -> None:
        """As `check_length`, before the text is tokenized: for one that no vocabulary could make short enough."""
        longest = self.engine.tokenizer.longest_token
        if num_chars > self.engine.info.max_model_len * longest:
            raise self._too_long(
                f"your prompt has {num_chars} characters, and no token stands for more than {longest}. Please shorten "
                "the prompt."
            )

    def _too_long(self, reason: str, param: str = "input_tokens") -> APIError:
        limit = self.engine.info.max_model_len
        message = f"This model's maximum context length is {limit} tokens. However, {reason}"
        return APIError(400, message, param=param, code="context_length_exceeded")

    def check_alive(self) -> None:
        """Raises `APIError` 503 once the engine is dead."""
        if self.engine.dead:
            raise APIError(503, self.engine.dead)

    async def encode(
        self, texts: Sequence[str], add_special_tokens: bool, max_chars: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text, which may have as many tokens as the context or, where it says so, `max_chars`.
        Raises `InvalidRequest` or `APIError`."""
        for text in texts:
            if max_chars is None:
                self.check_text(len(text))
            elif len(text) > max_chars:
                raise InvalidRequest(f"The text has {len(text)} characters; at most {max_chars} are taken.", "prompt")
        gone = False

        def work() -> list[list[int]]:
            return [self.engine.tokenizer.encode(text, add_special_tokens) for text in texts if not gone]

        try:
            return await self.off_loop(sum(map(len, texts)) + _CALL * len(texts), work)
        finally:
            gone = True  # for a thread that goes on when the client has left

    async def off_loop(self, num_chars: int, work: Callable[[], T]) -> T:
        """In a thread where the text is long, so that other requests' tokens go on flowing, and few such at a time. Of
        those that wait, very long ones do not hold up the others. Who is cancelled before it began does not run."""
        if num_chars <= _LONG_TEXT:
            return work()
        pool = self._long if num_chars <= _VERY_LONG_TEXT else self._very_long
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def generation(self, prompts: Sequence[list[int]], params: SamplingParams, header: Header) -> Generation:
        return Generation(self.engine, self.metrics, self.turns, prompts, params, header.id)
