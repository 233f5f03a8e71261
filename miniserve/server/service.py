"""What every endpoint shares: the engine, the names it is served under, the rules for requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from miniserve.core import Grammar, InvalidRequest, Request, SamplingParams
from miniserve.engine.grammar import check_grammar
from miniserve.engine.replicas import Engine
from miniserve.scheduler.limits import ContextExceeded, check_request
from miniserve.server.config import ServerConfig
from miniserve.server.errors import APIError
from miniserve.server.fields import Body, FieldPolicy
from miniserve.server.gate import Pace
from miniserve.server.generation import Generation, Turns
from miniserve.server.metrics import ServerMetrics
from miniserve.server.protocol import GenerationBody
from miniserve.server.reply import Answer, GenerationResponse
from miniserve.server.sampling import SamplingRules

T = TypeVar("T")
P = ParamSpec("P")
_LONG_TEXT = 16_384  # characters; beyond, encoding takes milliseconds
_VERY_LONG_TEXT = 262_144  # characters; beyond, it takes a good part of a second
_MAX_TEXT = 1_048_576  # characters of a text that need not fit into the context
_CALL = 64  # characters that could be encoded in the time that a call takes


class Service:
    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.model_names = config.served_model_names or (engine.info.model,)
        self.model = self.model_names[0]  # as answers have it
        self.started = int(time.time())
        # As many more than run as keep the engine from ever waiting for the next.
        self.turns = Turns(2 * engine.info.max_num_seqs * len(engine.engines), config.max_queue, config.max_prompts)
        self.rendered = Pace()  # conversations that go on once they are rendered, which many may be at once
        self.metrics = ServerMetrics(engine, self.turns, self.model)
        self.fields = FieldPolicy(config.strict_fields)
        self.rules = SamplingRules(engine.generation_defaults.sampling, engine.info.vocab_size, engine.tokenizer)
        self._long = ThreadPoolExecutor(2, "long-text")
        self._very_long = ThreadPoolExecutor(1, "very-long-text")
        self._grammars = ThreadPoolExecutor(2, "grammar")

    def admit(self, body: Body) -> None:
        """What is checked of every request. Raises `APIError` 404 for a model that there is not, and `InvalidRequest`
        for fields that would be ignored."""
        self.check_model(getattr(body, "model", None))
        self.fields.check(body)

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

    async def respond(self, answer: Answer, params: SamplingParams, body: GenerationBody) -> GenerationResponse:
        """All that can be wrong with the answer's prompts is found before any runs. Raises `InvalidRequest`, also where
        more output is asked for than the context can hold, which `check_request` would clamp; `APIError` 503."""
        self.check_alive()
        info, (field, asked) = self.engine.info, body.asked_tokens
        requests = []
        for number, ids in enumerate(answer.token_ids):
            request = Request(
                request_id=f"{answer.id}-{number}",
                prompt_token_ids=ids,
                params=params,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
            )
            requests.append(check_request(request, info))
            room = info.max_model_len - len(ids)
            if asked is not None and asked > room:
                raise ContextExceeded(
                    info.max_model_len,
                    f"you requested {len(ids) + asked} tokens: {len(ids)} in your prompt and {asked} of output. Please "
                    f"shorten the prompt, or ask for at most {room} tokens with {field}.",
                    len(ids),
                    asked,
                    field,
                )
            if number % 32 == 31:
                await asyncio.sleep(0)  # other requests' tokens go on flowing
        generation = Generation(self.engine, self.metrics, self.turns, requests, params)
        return GenerationResponse(generation, answer, bool(body.stream), self.config)

    async def check_grammar(self, param: str, grammar: Grammar) -> None:
        """Raises `InvalidRequest` naming the field `param` for what the output cannot be made to be."""
        await self.in_grammar_thread(check_grammar, grammar, self.engine.tokenizer, param)

    async def in_grammar_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Of what makes and checks grammars: it may take a second."""
        return await asyncio.get_running_loop().run_in_executor(self._grammars, partial(work, *args, **kwargs))

    def check_alive(self) -> None:
        """Raises `APIError` 503 once the engine is dead."""
        if self.engine.dead:
            raise APIError(503, self.engine.dead)

    def truncate(self, ids: list[int], body: GenerationBody) -> list[int]:
        """The tokens of a prompt that the request wants to keep. Raises `InvalidRequest`."""
        most, longest = body.truncate_prompt_tokens, self.engine.info.max_model_len
        if most is None:
            if body.truncation_side is not None:
                raise InvalidRequest("truncation_side needs truncate_prompt_tokens.", "truncation_side")
            return ids
        if not (most == -1 or 1 <= most <= longest):
            raise InvalidRequest(
                f"truncate_prompt_tokens must be between 1 and {longest}, or -1 for what leaves room for the output.",
                "truncate_prompt_tokens",
            )
        if most == -1:
            asked = body.asked_tokens[1]
            most = max(longest - (1 if asked is None else asked), 1)
        if len(ids) <= most:
            return ids
        return ids[:most] if body.truncation_side == "right" else ids[-most:]

    async def encode(self, texts: Sequence[str], add_special_tokens: bool, *, any_length: bool) -> list[list[int]]:
        """Token ids of each text, which may have as many tokens as the context or, with `any_length`, as many
        characters as this server takes. Raises `InvalidRequest`, before it is tokenized, for a text that is longer."""
        limit, longest = self.engine.info.max_model_len, self.engine.tokenizer.longest_token
        for text in texts:
            if not any_length and len(text) > limit * longest:
                raise ContextExceeded(
                    limit,
                    f"your prompt has {len(text)} characters, and no token stands for more than {longest}. Please "
                    "shorten the prompt.",
                )
            if any_length and len(text) > _MAX_TEXT:
                raise InvalidRequest(f"The text has {len(text)} characters; at most {_MAX_TEXT} are taken.", "prompt")
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
