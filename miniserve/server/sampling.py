"""From a request's fields to `SamplingParams`: what the request says, else the model's default, else OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from miniserve.core import InvalidRequest, SamplingParams
from miniserve.engine.tokenizer import Tokenizer
from miniserve.scheduler.limits import check_logprobs
from miniserve.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationBody
from miniserve.server.structured import find_grammar

_MAX_BAD_WORDS, _LONGEST_BAD_WORD = 256, 128


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """The model's sampling defaults (of generation_config.json). What depends on the prompt or the engine is checked by
    `check_request`."""

    defaults: Mapping[str, float | int]
    vocab_size: int
    tokenizer: Tokenizer

    def for_completion(self, body: CompletionRequest) -> SamplingParams:
        """Raises `InvalidRequest`."""
        if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
            raise InvalidRequest(
                "max_tokens must be at least 1 (0 is for echo or prompt_logprobs alone).", "max_tokens"
            )
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        prompt_logprobs, logprobs = body.prompt_logprobs, body.logprobs
        if body.echo and logprobs is not None:
            if prompt_logprobs not in (None, logprobs):
                raise InvalidRequest(
                    "prompt_logprobs must be logprobs where echo asks for the prompt's, too.", "prompt_logprobs"
                )
            prompt_logprobs = logprobs
        params = self._params(body, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        best_of = params.n if body.best_of is None else body.best_of
        if best_of == params.n:
            return params
        if best_of < params.n and best_of != 1:
            raise InvalidRequest(f"best_of must be at least n, which is {params.n}.", "best_of")
        if best_of > params.n and body.stream:
            raise InvalidRequest(
                "best_of above n cannot be streamed: which are the best is known at the end.", "best_of"
            )
        return params if best_of == 1 else self._best_of(params, best_of)

    def _best_of(self, params: SamplingParams, best_of: int) -> SamplingParams:
        """So many sequences, with what they are judged by."""
        try:
            return msgspec.structs.replace(params, n=best_of, logprobs=params.logprobs or 0)
        except InvalidRequest as error:
            raise InvalidRequest(str(error).replace("n ", "best_of ", 1), "best_of") from None

    def for_chat(self, body: ChatCompletionRequest) -> SamplingParams:
        """Raises `InvalidRequest`; `max_tokens` None is the rest of the context."""
        name, max_tokens = body.asked_tokens
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequest(f"{name} must be at least 1.", name)
        if max_tokens is None and (default := self.defaults.get("max_new_tokens")) is not None:
            max_tokens = int(default)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
        check_logprobs(body.top_logprobs, "top_logprobs", self.vocab_size)
        return self._params(
            body,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )

    def _params(self, body: GenerationBody, **lengths: int | None) -> SamplingParams:
        options = body.stream_options
        if options is not None and not body.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", "stream_options")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest(
                "stream_options.continuous_usage_stats needs include_usage to be true.",
                "stream_options.continuous_usage_stats",
            )
        same = type(body).model_fields.keys() & SamplingParams.__struct_fields__
        values: dict[str, Any] = {name: self.defaults[name] for name in same & self.defaults.keys()}
        for name in same:
            if (value := getattr(body, name)) is not None:
                values[name] = tuple(value) if isinstance(value, list) else value
        if values.get("seed") == -1:  # llama.cpp's word for none, and vLLM's
            del values["seed"]
        values["top_k"] = min(int(values.get("top_k", 0)), self.vocab_size)
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed; set stream to false.", "prompt_logprobs")
        grammar = find_grammar(body)
        values["bad_words"] = self._bad_words(body.bad_words or ())
        params = SamplingParams(**{**values, "grammar": grammar and grammar[1], **lengths})
        if body.extras.get("do_sample") is False and not params.greedy:
            raise InvalidRequest("do_sample false asks for greedy decoding; set temperature to 0.", "do_sample")
        if body.extras.get("do_sample") is True and params.greedy:
            raise InvalidRequest("do_sample true asks for a draw; set temperature above 0.", "do_sample")
        return params

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """What each would be as tokens at the start of a text, and after a space."""
        if len(words) > _MAX_BAD_WORDS or not all(0 < len(word) <= _LONGEST_BAD_WORD for word in words):
            raise InvalidRequest(
                f"bad_words must be at most {_MAX_BAD_WORDS} texts of 1 to {_LONGEST_BAD_WORD} characters.", "bad_words"
            )
        spellings = [text for word in words for text in (word, " " + word.lstrip())]
        return tuple(dict.fromkeys(tuple(self.tokenizer.encode(text, False)) for text in spellings))
