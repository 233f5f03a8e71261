"""A request body to `SamplingParams`: the request's value, else the model's default, else OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miniserve.core import InvalidRequest, SamplingParams
from miniserve.engine.validation import MAX_LOGPROBS
from miniserve.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationBody

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN = (
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "n",
)


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """The model's sampling defaults (of generation_config.json) and the server's limits. What depends on the prompt or
    the vocabulary is checked by `AsyncEngine.generate`."""

    defaults: Mapping[str, float | int]
    vocab_size: int
    max_prompts: int

    def for_completion(self, body: CompletionRequest) -> SamplingParams:
        """Raises `InvalidRequest`."""
        n = 1 if body.n is None else body.n
        if body.best_of not in (None, 1, n):
            raise InvalidRequest("best_of is not supported; leave it out or set it to n.", "best_of")
        if n > 0 and len(body.prompt) * n > self.max_prompts:
            raise InvalidRequest(
                f"The request asks for {len(body.prompt) * n} sequences (prompts times n), and this server takes at "
                f"most {self.max_prompts} in one request.",
                "prompt" if len(body.prompt) > self.max_prompts else "n",
            )
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens must be at least 1 (0 is for echo alone).", "max_tokens")
        logprobs = self._logprobs(body.logprobs, "logprobs")
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        return self._params(
            body, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=logprobs if body.echo else None
        )

    def for_chat(self, body: ChatCompletionRequest) -> SamplingParams:
        """Raises `InvalidRequest`; `max_tokens` None is the rest of the context."""
        name, max_tokens = body.asked_tokens
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequest(f"{name} must be at least 1.", name)
        if max_tokens is None and (default := self.defaults.get("max_new_tokens")) is not None:
            max_tokens = int(default)
        if body.top_logprobs is not None and not body.logprobs:
            if body.top_logprobs != 0:
                raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
            logprobs = None
        else:
            logprobs = self._logprobs(body.top_logprobs or 0, "top_logprobs") if body.logprobs else None
        return self._params(body, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=None)

    def _logprobs(self, value: int | None, param: str) -> int | None:
        if value is not None and not 0 <= value <= MAX_LOGPROBS:
            raise InvalidRequest(f"{param} must be between 0 and {MAX_LOGPROBS}.", param)
        return value

    def _params(self, body: GenerationBody, **settled: Any) -> SamplingParams:
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", "stream_options")
        values: dict[str, Any] = {name: self.defaults[name] for name in _DEFAULTED if name in self.defaults}
        named = {name: getattr(body, name) for name in (*_DEFAULTED, *_PLAIN)}
        values |= {name: value for name, value in named.items() if value is not None}
        values["top_k"] = min(int(values.get("top_k", 0)), self.vocab_size)
        params = SamplingParams(
            stop=tuple(body.stop or ()), stop_token_ids=tuple(body.stop_token_ids or ()), **values, **settled
        )
        if body.extras.get("do_sample") is False and not params.greedy:
            raise InvalidRequest("do_sample false asks for greedy decoding; set temperature to 0.", "do_sample")
        return params
