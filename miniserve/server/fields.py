"""What a request's fields mean. Those that the protocol types do not declare are refused, ignored, or warned about;
the others become `SamplingParams`: the value in the request, else the default of the model, else that of OpenAI."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from miniserve.core import InvalidRequest, SamplingParams
from miniserve.engine.tokenizer import Tokenizer
from miniserve.scheduler.limits import check_logprobs
from miniserve.server.protocol import Body, ChatCompletionRequest, CompletionRequest, GenerationBody
from miniserve.server.structured import find_grammar

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 1000  # field names come from clients, so remembering them needs a bound
_MAX_BAD_WORDS, _LONGEST_BAD_WORD = 256, 128
_MAX_UNKNOWN = 64  # in one request: each is compared with every known name

Refused = Mapping[str, tuple[object, ...]]

# They would change the answer and are not supported: refused unless null or one of the values that ask for nothing.
REFUSED: dict[str, tuple[object, ...]] = {
    # other servers' names for structured output
    "structural_tag": (), "json_schema": (), "regex": (), "ebnf": (), "grammar": ("",), "guided_whitespace_pattern": (),
    # tools
    "functions": ([],), "function_call": ("none",), "web_search_options": (),
    # what may be sampled, and how
    "suffix": (), "logits_processors": ([],), "logit_processors": ([],),
    "custom_logit_processor": (), "use_beam_search": (False,), "num_beams": (1,), "early_stopping": (False,),
    "length_penalty": (1,), "no_repeat_ngram_size": (0,), "typical_p": (1,), "mirostat": (0,), "dry_multiplier": (0,),
    "xtc_probability": (0,), "thinking_token_budget": (), "repetition_detection": (), "vllm_xargs": ({},),
    "lora_path": (), "lora": ([],), "samplers": (), "dynatemp_range": (0,), "repeat_last_n": (-1,), "top_a": (0,),
    "tfs_z": (1,), "top_n_sigma": (-1, 0), "watermark": (False,), "watermarking": (), "custom_params": (),
    "penalty_alpha": (0,), "stop_regex": ([], ""), "typ_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "guidance_scale": (1,), "negative_prompt": ("",), "t_max_predict_ms": (-1, 0),
    # what goes in
    "prompt_embeds": (), "audio": (), "mm_processor_kwargs": ({},),
    "system": ("",), "images": ([],), "image_data": ([],), "reasoning": (), "thinking_budget": (),
    "kv_transfer_params": (), "session_params": (),
    # what comes out
    "modalities": (["text"],), "return_prompt_text": (False,),
    "spaces_between_special_tokens": (True,), "return_tokens": (False,), "return_hidden_states": (False,),
    "return_prompt_token_ids": (False,), "return_token_offsets": (False,),
    "moderation": (), "separate_reasoning": (True,), "stream_reasoning": (True,),
    "reasoning_format": ("auto", "deepseek", "parsed"),
    # other servers' names for what has another one here
    "format": ("",), "random_seed": (), "sampling_seed": (), "max_tokens_to_sample": (),
    "n_predict": (), "num_predict": (), "max_new_tokens": (), "max_output_tokens": (), "max_length": (),
    "min_new_tokens": (0,), "min_length": (0,), "repeat_penalty": (1,), "n_probs": (0,), "top_logprobs_num": (0,),
    "return_logprob": (False,), "num_return_sequences": (1,), "stop_sequences": ([],), "stop_strings": ([],),
    "eos_token_id": (), "no_stop_trim": (False,), "input_ids": (), "inputs": (), "input": (), "enable_thinking": (),
    "thinking": (), "think": (), "options": ({},), "sampling_params": ({},), "parameters": ({},), "extra_body": ({},),
    "max_gen_toks": (), "n_cmpl": (1,), "candidate_count": (1,), "generation_config": ({},), "top_n_tokens": (0,),
    "decoder_input_details": (False,), "return_full_text": (False,), "details": (False,), "truncate": (),
    "truncation_length": (0,), "logprob_start_len": (-1,), "custom_token_bans": ("",), "banned_tokens": ([],),
    "banned_strings": ([],), "ban_eos_token": (False,), "add_bos_token": (True,), "auto_max_new_tokens": (False,),
    "adapter_id": (), "request_id": (), "rid": (), "instructions": ("",), "previous_response_id": (),
    "conversation": (), "text": ({"format": {"type": "text"}},), "background": (False,), "include": ([],),
    # other engines' settings that have none like them here
    "verbosity": ("medium",), "n_keep": (0,), "n_discard": (0,), "n_indent": (0,), "num_keep": (0,), "num_ctx": (),
    "penalize_nl": (False,), "min_keep": (0,), "input_prefix": ("",), "input_suffix": ("",), "input_extra": ([],),
    "return_progress": (False,), "timings_per_token": (False,), "post_sampling_probs": (False,),
    "response_fields": ([],), "template": ("",), "context": ([],), "raw": (False,), "smoothing_factor": (0,),
    "dynamic_temperature": (False,), "encoder_repetition_penalty": (1,), "repetition_penalty_range": (0,),
    "max_tokens_second": (0,), "token_healing": (False,), "prompt_mode": (), "safe_prompt": (False,),
    "input_embeds": (), "video_data": ([],), "audio_data": ([],), "return_routed_experts": (False,),
}  # fmt: skip
REFUSED_IN_COMPLETIONS = REFUSED | {
    "max_completion_tokens": (), "top_logprobs": (0,), "messages": (), "tools": ([],), "tool_choice": ("none",),
    "reasoning_effort": (), "include_reasoning": (True,), "parallel_tool_calls": (True, False),
}  # fmt: skip
REFUSED_IN_CHAT = REFUSED | {"best_of": (1,), "prompt": ()}
# Of `/tokenize` and `/detokenize`, which generate nothing.
REFUSED_OF_TOKENIZER: dict[str, tuple[object, ...]] = {
    "truncate_prompt_tokens": (), "truncation_side": (), "skip_special_tokens": (False,),
}  # fmt: skip

_THINKING = 'use chat_template_kwargs, for example {"enable_thinking": false}, where the template knows it'
_CHAT = "ask /v1/chat/completions"
_FLAT = "send what it holds as fields of the request itself, under OpenAI's names"
_REMEDIES = {
    "structural_tag": "use response_format", "json_schema": "use response_format", "regex": "use structured_outputs",
    "ebnf": "use structured_outputs", "grammar": "use structured_outputs",
    "reasoning": _THINKING, "thinking_budget": _THINKING,
    "enable_thinking": _THINKING, "thinking": _THINKING, "think": _THINKING,
    "separate_reasoning": "use include_reasoning", "reasoning_format": "use include_reasoning",
    "functions": "use tools", "function_call": "use tool_choice",
    "tools": _CHAT, "tool_choice": _CHAT, "parallel_tool_calls": _CHAT, "reasoning_effort": _CHAT,
    "include_reasoning": _CHAT,
    "num_beams": "leave it out or send 1",
    "max_completion_tokens": "use max_tokens",
    "top_logprobs": "use logprobs, which is a number here",
    "messages": "send a prompt, or ask /v1/chat/completions",
    "prompt": "send messages, or ask /v1/completions",
    "n_predict": "use max_tokens", "num_predict": "use max_tokens", "max_new_tokens": "use max_tokens",
    "max_output_tokens": "use max_tokens", "max_tokens_to_sample": "use max_tokens",
    "random_seed": "use seed", "sampling_seed": "use seed",
    "system": "send a message whose role is system to /v1/chat/completions",
    "max_length": "use max_tokens, which does not count the prompt",
    "min_new_tokens": "use min_tokens", "min_length": "use min_tokens, which does not count the prompt",
    "repeat_penalty": "use repetition_penalty",
    "repeat_last_n": "repetition_penalty counts the whole prompt and output",
    "n_probs": "use logprobs", "top_logprobs_num": "use logprobs", "return_logprob": "use logprobs",
    "num_return_sequences": "use n",
    "stop_sequences": "use stop", "stop_strings": "use stop", "stop_regex": "use stop, whose strings are plain text",
    "eos_token_id": "use stop_token_ids",
    "no_stop_trim": "use include_stop_str_in_output",
    "input_ids": "use prompt, which takes token ids, too, in /v1/completions", "inputs": "use prompt or messages",
    "input": "use prompt or messages",
    "samplers": "leave it out; their order is min_p, top_k, top_p",
    "options": f"{_FLAT} (num_predict is max_tokens)", "sampling_params": f"{_FLAT} (max_new_tokens is max_tokens)",
    "parameters": f"{_FLAT} (max_new_tokens is max_tokens)", "extra_body": _FLAT,
    "max_gen_toks": "use max_tokens", "auto_max_new_tokens": "leave max_tokens out of a chat",
    "n_cmpl": "use n", "candidate_count": "use n", "generation_config": _FLAT, "top_n_tokens": "use logprobs",
    "decoder_input_details": "use prompt_logprobs", "details": "use logprobs",
    "logprob_start_len": "use prompt_logprobs", "return_full_text": "use echo",
    "truncate": "use truncate_prompt_tokens",
    "truncation_length": "use truncate_prompt_tokens", "custom_token_bans": "use bad_words, or logit_bias of -100",
    "banned_tokens": "use logit_bias of -100", "banned_strings": "use bad_words",
    "ban_eos_token": "use ignore_eos, or min_tokens", "add_bos_token": "use add_special_tokens",
    "request_id": "send the header X-Request-Id", "rid": "send the header X-Request-Id",
    "instructions": "send a message whose role is system to /v1/chat/completions",
    "previous_response_id": "send the whole conversation; none is kept",
    "conversation": "send the whole conversation; none is kept", "text": "use response_format",
    "verbosity": "say in a message how long the answer shall be", "n_keep": "use truncate_prompt_tokens",
    "num_keep": "use truncate_prompt_tokens", "num_ctx": "start the server with --max-model-len",
    "template": "use chat_template, where the operator allows it", "context": "send the whole conversation",
    "raw": "/v1/completions takes a prompt as it is", "return_tokens": "use return_token_ids",
    "return_prompt_token_ids": "use return_token_ids",
}  # fmt: skip

# Without effect on the answer by their nature, or only a hint; do_sample is judged together with temperature.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "stream_interval", "session_id", "do_sample", "models", "cache_prompt",
    "guided_decoding_backend", "keep_alive", "id_slot", "data_parallel_rank", "conversation_id",
    "chat_id", "message_id", "prompt_cache_options", "include_obfuscation",
})  # fmt: skip

# Other names of max_tokens. lm_eval sends some beside it: there is nothing to refuse where max_tokens stops no later.
_LENGTHS = frozenset({
    "max_new_tokens", "max_gen_toks", "n_predict", "num_predict", "max_output_tokens", "max_tokens_to_sample",
})  # fmt: skip

# Fields that go to `SamplingParams` as they are; of the first group the model may have defaults.
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


class FieldPolicy:
    """Judges extra fields; remembers which it has warned about. `strict`: unknown ones are refused."""

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        # By the kind of body, since each knows other names.
        self._warned: set[tuple[type[Body], str]] = set()

    def check(self, body: Body, refused: Refused, remedies: Mapping[str, str] | None = None) -> None:
        """Raises `InvalidRequest` naming the first field that would change the answer and is not supported, or that is
        a known one misspelt. `remedies`: see `remedy`."""
        options = getattr(body, "stream_options", None)
        if isinstance(options, Body):
            self.check(options, {})
        if not body.extras:
            return
        unknown = []
        for name, value in body.extras.items():
            if name in refused:
                if not _asks_for_nothing(name, value, refused[name], body):
                    raise InvalidRequest(f"{name} is not supported here; {remedy(name, remedies)}.", name)
            elif name not in IGNORED and (type(body), name) not in self._warned:
                unknown.append(name)
        if len(unknown) > _MAX_UNKNOWN:
            raise InvalidRequest(f"The request has {len(unknown)} unknown fields, such as {unknown[0][:100]!r}.")
        for name in unknown:
            meant = _closest(name, (*type(body).model_fields, *refused))
            if meant is not None and meant in refused:
                instead = remedy(meant, remedies)
                raise InvalidRequest(
                    f"The field {name!r} is not known. If you mean {meant}: it is not supported here; {instead}.", name
                )
            if meant is not None:
                raise InvalidRequest(f"The field {name!r} is not known; did you mean {meant}?", name)
            if self._strict:
                raise InvalidRequest(f"The field {name!r} is not known, and this server takes no unknown ones.", name)
            if len(self._warned) < _MAX_WARNINGS:
                self._warned.add((type(body), name))
                logger.warning("Ignoring the unknown request field %.100r (said once per field).", name)


def remedy(name: str, remedies: Mapping[str, str] | None = None) -> str:
    """What to do instead of sending a refused field; by default to completions or chat."""
    return (_REMEDIES if remedies is None else remedies).get(name, "leave it out")


def refused_beside(body: type[Body], more: Refused) -> Refused:
    """In an endpoint that serves a chat under names of its own: what chat takes or refuses and `body` has not."""
    chat = dict.fromkeys(ChatCompletionRequest.model_fields, ()) | {"n": (1,), "logprobs": (False,), "do_sample": ()}
    return {name: values for name, values in {**chat, **REFUSED, **more}.items() if name not in body.model_fields}


def remedies_beside(length: str, own: Mapping[str, str]) -> Mapping[str, str]:
    """Of such an endpoint, which calls max_tokens `length`."""
    chat = dict.fromkeys([*ChatCompletionRequest.model_fields, *_REMEDIES], _CHAT)
    kept = {name: _REMEDIES[name] for name in ("previous_response_id", "conversation", "context", "verbosity")}
    lengths = dict.fromkeys([*_LENGTHS, "max_tokens", "max_completion_tokens"], f"use {length}")
    return {**chat, **kept, **lengths, **own}


def _asks_for_nothing(name: str, value: object, neutrals: tuple[object, ...], body: Body) -> bool:
    if value is None or any(_same(value, neutral) for neutral in neutrals):
        return True
    if name not in _LENGTHS or not isinstance(body, GenerationBody) or type(value) is not int:
        return False
    most = body.asked_tokens[1]
    return most is not None and most <= value


def _same(value: object, neutral: object) -> bool:
    """1 and 1.0 are the same number; True is no number."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is in another spelling (maxTokens) or with a slip: of one letter, or of two in a long
    name; short names have neighbours by chance."""
    plain, letters = _plain(name[:100])
    for slips, shortest in ((0, 1), (1, 5), (2, 8)):
        for each in known:
            other, other_letters = _plain_known(each)
            if (
                min(len(plain), len(other)) >= shortest
                and len(letters ^ other_letters) <= 2 * slips  # most are ruled out here
                and _within(plain, other, slips)
            ):
                return each
    return None


def _plain(name: str) -> tuple[str, frozenset[str]]:
    plain = name.replace("_", "").replace("-", "").lower()
    return plain, frozenset(plain)


_plain_known = cache(_plain)


def _within(a: str, b: str, slips: int) -> bool:
    """Whether `slips` letters at most are to be changed, added, left out or swapped with the next to turn a into b."""
    if abs(len(a) - len(b)) > slips:
        return False
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    if not a or not b or not slips:
        return len(a) + len(b) <= slips
    return (
        _within(a[1:], b[1:], slips - 1)
        or _within(a[1:], b, slips - 1)
        or _within(a, b[1:], slips - 1)
        or (a[:2] == b[1::-1] and _within(a[2:], b[2:], slips - 1))
    )


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

    def _params(self, body: GenerationBody, **settled: Any) -> SamplingParams:
        options = body.stream_options
        if options is not None and not body.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", "stream_options")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest(
                "stream_options.continuous_usage_stats needs include_usage to be true.",
                "stream_options.continuous_usage_stats",
            )
        values: dict[str, Any] = {name: self.defaults[name] for name in _DEFAULTED if name in self.defaults}
        named = {name: getattr(body, name) for name in (*_DEFAULTED, *_PLAIN)}
        values |= {name: value for name, value in named.items() if value is not None}
        values["top_k"] = min(int(values.get("top_k", 0)), self.vocab_size)
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed; set stream to false.", "prompt_logprobs")
        grammar = find_grammar(body)
        params = SamplingParams(
            grammar=grammar and grammar[1],
            stop=tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
            bad_words=self._bad_words(body.bad_words or ()),
            logprob_token_ids=tuple(body.logprob_token_ids or ()),
            **values,
            **settled,
        )
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
