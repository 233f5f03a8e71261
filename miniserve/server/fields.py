"""Fields of requests that their types do not declare: they are kept, and refused, ignored, or warned about."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from miniserve.core import InvalidRequest

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 1000  # field names come from clients, so remembering them needs a bound
_MAX_UNKNOWN = 64  # in one request: each is compared with every known name


class Refusal(NamedTuple):
    """Of a field that would change the answer and is not supported. neutrals: the values that ask for nothing, beside
    null. remedy: what to do instead. code: a word that clients know the refusal by."""

    neutrals: tuple[object, ...]
    remedy: str
    code: str | None = None


Refused = Mapping[str, Refusal]


def refusals(by_remedy: Mapping[str, Mapping[str, tuple[object, ...]]]) -> Refused:
    """`by_remedy`: the neutral values of each field."""
    return {
        name: Refusal(neutrals, remedy) for remedy, fields in by_remedy.items() for name, neutrals in fields.items()
    }


LEAVE_OUT, ASK_CHAT = "leave it out", "ask /v1/chat/completions"
_THINKING = 'use chat_template_kwargs, for example {"enable_thinking": false}, where the template knows it'
_FLAT = "send what it holds as fields of the request itself, under OpenAI's names"

# Of completions and chat: what other servers and engines know.
REFUSED = refusals({
    "use response_format": {"structural_tag": (), "json_schema": (), "text": ({"format": {"type": "text"}},)},
    "use structured_outputs": {"regex": (), "ebnf": (), "grammar": ("",)},
    "use tools": {"functions": ([],)},
    "use tool_choice": {"function_call": ("none",)},
    "leave it out or send 1": {"num_beams": (1,)},
    "leave it out; their order is min_p, top_k, top_p": {"samplers": ()},
    "repetition_penalty counts the whole prompt and output": {"repeat_last_n": (-1,)},
    "use stop, whose strings are plain text": {"stop_regex": ([], "")},
    "send a message whose role is system to /v1/chat/completions": {"system": ("",), "instructions": ("",)},
    _THINKING: {"reasoning": (), "thinking_budget": (), "enable_thinking": (), "thinking": (), "think": ()},
    "use return_token_ids": {"return_tokens": (False,), "return_prompt_token_ids": (False,)},
    "use include_reasoning": {"separate_reasoning": (True,), "reasoning_format": ("auto", "deepseek", "parsed")},
    "use seed": {"random_seed": (), "sampling_seed": ()},
    "use max_tokens": {
        "max_tokens_to_sample": (), "n_predict": (), "num_predict": (), "max_new_tokens": (), "max_output_tokens": (),
        "max_gen_toks": (),
    },
    "use max_tokens, which does not count the prompt": {"max_length": ()},
    "use min_tokens": {"min_new_tokens": (0,)},
    "use min_tokens, which does not count the prompt": {"min_length": (0,)},
    "use repetition_penalty": {"repeat_penalty": (1,)},
    "use logprobs": {
        "n_probs": (0,), "top_logprobs_num": (0,), "return_logprob": (False,), "top_n_tokens": (0,),
        "details": (False,),
    },
    "use n": {"num_return_sequences": (1,), "n_cmpl": (1,), "candidate_count": (1,)},
    "use stop": {"stop_sequences": ([],), "stop_strings": ([],)},
    "use stop_token_ids": {"eos_token_id": ()},
    "use include_stop_str_in_output": {"no_stop_trim": (False,)},
    "use prompt, which takes token ids, too, in /v1/completions": {"input_ids": ()},
    "use prompt or messages": {"inputs": (), "input": ()},
    f"{_FLAT} (num_predict is max_tokens)": {"options": ({},)},
    f"{_FLAT} (max_new_tokens is max_tokens)": {"sampling_params": ({},), "parameters": ({},)},
    _FLAT: {"extra_body": ({},), "generation_config": ({},)},
    "use prompt_logprobs": {"decoder_input_details": (False,), "logprob_start_len": (-1,)},
    "use echo": {"return_full_text": (False,)},
    "use truncate_prompt_tokens": {"truncate": (), "truncation_length": (0,), "n_keep": (0,), "num_keep": (0,)},
    "use bad_words, or logit_bias of -100": {"custom_token_bans": ("",)},
    "use logit_bias of -100": {"banned_tokens": ([],)},
    "use bad_words": {"banned_strings": ([],)},
    "use ignore_eos, or min_tokens": {"ban_eos_token": (False,)},
    "use add_special_tokens": {"add_bos_token": (True,)},
    "leave max_tokens out of a chat": {"auto_max_new_tokens": (False,)},
    "send the header X-Request-Id": {"request_id": (), "rid": ()},
    "send the whole conversation; none is kept": {"previous_response_id": (), "conversation": ()},
    "say in a message how long the answer shall be": {"verbosity": ("medium",)},
    "start the server with --max-model-len": {"num_ctx": ()},
    "use chat_template, where the operator allows it": {"template": ("",)},
    "send the whole conversation": {"context": ([],), "previous_input_messages": ([],)},
    "/v1/completions takes a prompt as it is": {"raw": (False,)},
    LEAVE_OUT: {
        "guided_whitespace_pattern": (), "web_search_options": (), "suffix": (), "logits_processors": ([],),
        "logit_processors": ([],), "custom_logit_processor": (), "use_beam_search": (False,),
        "early_stopping": (False,), "length_penalty": (1,), "no_repeat_ngram_size": (0,), "typical_p": (1,),
        "mirostat": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "thinking_token_budget": (-1,),
        "repetition_detection": (), "vllm_xargs": ({},), "lora_path": (), "lora": ([],), "dynatemp_range": (0,),
        "top_a": (0,), "tfs_z": (1,), "top_n_sigma": (-1, 0), "watermark": (False,), "watermarking": (False,),
        "custom_params": (), "penalty_alpha": (0,), "typ_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
        "guidance_scale": (1,), "negative_prompt": ("",), "t_max_predict_ms": (-1, 0), "prompt_embeds": (), "audio": (),
        "mm_processor_kwargs": ({},), "images": ([],), "image_data": ([],), "kv_transfer_params": (),
        "session_params": (), "modalities": (["text"],), "return_prompt_text": (False,),
        "spaces_between_special_tokens": (True,), "return_hidden_states": (False,), "return_token_offsets": (False,),
        "moderation": (), "stream_reasoning": (True,), "format": ("",), "adapter_id": (), "background": (False,),
        "include": ([],), "n_discard": (0,), "n_indent": (0,), "penalize_nl": (False,), "min_keep": (0,),
        "input_prefix": ("",), "input_suffix": ("",), "input_extra": ([],), "return_progress": (False,),
        "timings_per_token": (False,), "post_sampling_probs": (False,), "response_fields": ([],),
        "smoothing_factor": (0,), "dynamic_temperature": (False,), "encoder_repetition_penalty": (1,),
        "repetition_penalty_range": (0,), "max_tokens_second": (0,), "token_healing": (False,), "prompt_mode": (),
        "safe_prompt": (False,), "input_embeds": (), "video_data": ([],), "audio_data": ([],),
        "return_routed_experts": (False,), "routed_experts_prompt_start": (0,), "return_weight_versions": (False,),
        "media_io_kwargs": ({},), "mm_payload": (), "return_mm_kwargs": (False,), "ec_transfer_params": (),
        "enable_response_messages": (False,),
    },
})  # fmt: skip
REFUSED_IN_COMPLETIONS = {**REFUSED, **refusals({
    "use max_tokens": {"max_completion_tokens": ()},
    "use logprobs, which is a number here": {"top_logprobs": (0,)},
    "send a prompt, or ask /v1/chat/completions": {"messages": ()},
    ASK_CHAT: {
        "tools": ([],), "tool_choice": ("none",), "reasoning_effort": (), "include_reasoning": (True,),
        "parallel_tool_calls": (True, False),
    },
})}  # fmt: skip
REFUSED_IN_CHAT = {
    **REFUSED, **refusals({LEAVE_OUT: {"best_of": (1,)}, "send messages, or ask /v1/completions": {"prompt": ()}})
}  # fmt: skip
# Of `/tokenize` and `/detokenize`, which generate nothing.
REFUSED_OF_TOKENIZER = refusals({
    LEAVE_OUT: {"truncate_prompt_tokens": (), "truncation_side": (), "skip_special_tokens": (False,)}
})  # fmt: skip

# Without effect on the answer by their nature, or only a hint; do_sample is judged together with temperature.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "stream_interval", "session_id", "do_sample", "models", "cache_prompt",
    "guided_decoding_backend", "keep_alive", "id_slot", "data_parallel_rank", "conversation_id",
    "chat_id", "message_id", "prompt_cache_options", "include_obfuscation", "client_metadata",
})  # fmt: skip

# Other names of max_tokens. lm_eval sends some beside it: there is nothing to refuse where max_tokens stops no later.
OTHER_LENGTHS = frozenset({
    "max_new_tokens", "max_gen_toks", "n_predict", "num_predict", "max_output_tokens", "max_tokens_to_sample",
})  # fmt: skip


class Lenient(BaseModel):
    """Keeps fields that it does not declare: those of a conversation are for the chat template to judge."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def extras(self) -> dict[str, Any]:
        return self.model_extra or {}


class Body(Lenient):
    """A request, or a part of one, whose extra fields `FieldPolicy` judges."""

    refused: ClassVar[Refused] = {}

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        """The field that says how long the output may be, and what it says."""
        return "max_tokens", None


class Exact(BaseModel):
    """Any other field is an error: it would be meant to change the output."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FieldPolicy:
    """Judges extra fields; remembers which it has warned about. `strict`: unknown ones are refused."""

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        # By the kind of body, since each knows other names.
        self._warned: set[tuple[type[Body], str]] = set()

    def check(self, body: Body) -> None:
        """Raises `InvalidRequest` naming the first field of a request or of its parts that would change the answer and
        is not supported, or that is a known one misspelt."""
        for part in _parts(body):
            if part.extras:
                self._check(part)

    def _check(self, body: Body) -> None:
        refused, unknown = body.refused, []
        for name, value in body.extras.items():
            if name in refused:
                if not _asks_for_nothing(name, value, body):
                    message = f"{name} is not supported here; {refused[name].remedy}."
                    raise InvalidRequest(message, name, refused[name].code)
            elif name not in IGNORED and (type(body), name) not in self._warned:
                unknown.append(name)
        if len(unknown) > _MAX_UNKNOWN:
            raise InvalidRequest(f"The request has {len(unknown)} unknown fields, such as {unknown[0][:100]!r}.")
        known = {_plain(name): name for name in (*refused, *type(body).model_fields)} if unknown else {}
        for name in unknown:
            meant = _closest(name, known)
            if meant is not None and meant in refused:
                raise InvalidRequest(
                    f"The field {name!r} is not known. If you mean {meant}: it is not supported here; "
                    f"{refused[meant].remedy}.",
                    name,
                )
            if meant is not None:
                raise InvalidRequest(f"The field {name!r} is not known; did you mean {meant}?", name)
            self.pass_over(type(body), name)

    def pass_over(self, kind: type[Body], name: str) -> None:
        """Warn once of a field without effect in such a body. Raises `InvalidRequest` where the server is strict."""
        if self._strict:
            raise InvalidRequest(f"The field {name!r} is not known, and this server takes no unknown ones.", name)
        if (kind, name) not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add((kind, name))
            logger.warning("Ignoring the unknown request field %.100r (said once per field).", name)


def _parts(body: Body) -> Iterator[Body]:
    """A body and those in it, however deep."""
    yield body
    for value in vars(body).values():
        if isinstance(value, Body):
            yield from _parts(value)
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for each in value:
                yield from _parts(each)


def _asks_for_nothing(name: str, value: object, body: Body) -> bool:
    if value is None or any(_same(value, neutral) for neutral in body.refused[name].neutrals):
        return True
    most = body.asked_tokens[1]
    return name in OTHER_LENGTHS and type(value) is int and most is not None and most <= value


def _same(value: object, neutral: object) -> bool:
    """1 and 1.0 are the same number; True is no number."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _closest(name: str, known: Mapping[str, str]) -> str | None:
    """The known name that `name` is in another spelling (maxTokens) or with a slip: of one letter, or of two in a long
    name; short names have neighbours by chance. `known`: names by their `_plain` spelling."""
    plain = _plain(name[:100])
    if plain in known:
        return known[plain]
    for slips, shortest in ((1, 5), (2, 8)):
        for each, meant in known.items():
            if min(len(plain), len(each)) >= shortest and _within(plain, each, slips):
                return meant
    return None


def _within(a: str, b: str, slips: int) -> bool:
    """Whether `slips` letters at most are to be changed, added, left out or swapped with the next to turn a into b."""
    if abs(len(a) - len(b)) > slips or len(set(a) ^ set(b)) > 2 * slips:  # which rules out most at once
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


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
