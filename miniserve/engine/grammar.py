"""Grammars: is one sound, and which tokens does it allow next? By llguidance, whose work for a grammar and for a mask
is bounded: past its limits there is an error.

A grammar is checked in the process that takes the request, over bytes as vocabulary. The engine's process makes a
matcher of it over the model's vocabulary, beside its steps, before the scheduler gets the request.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby
from time import perf_counter
from typing import Any, Literal

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark

from miniserve.core import MAX_BAD_WORD, Grammar, InvalidRequest, Matcher, Reasoning, SamplingParams, TokenMasks
from miniserve.engine.tokenizer import Tokenizer

# What keeps the worst that was found below a second of work. Some of llguidance's work is quadratic in such numbers.
MAX_BYTES = 262_144  # of a grammar's text
_MAX_LARK_BYTES = 16_384
_MAX_TAGS = 512
_MAX_PROPERTIES, _MAX_PATTERNS = 2_000, 64  # in all of a schema
_SMALL = 8192  # words of a step's masks that are made in less time than it takes to hand them to another thread
_ALONE = 2e-4  # seconds that a thread gives a step's masks before others help: most masks take some microseconds
_KEPT = 32  # grammars of late; the largest take 8 MB each
_LIMITS = LLParserLimits(verbose_errors=False)
# JSON may be written on one line or indented, but white space must not go on for ever, as some models would have it.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ ]?|\n[ ]{0,32}", "lenient": False, "coerce_one_of": False}


class GrammarError(ValueError):
    """A grammar that is no such, or that is too much; `str(error)` says why, in a line."""


def check_grammar(grammar: Grammar, tokenizer: Tokenizer, param: str = "grammar") -> None:
    """Raises `InvalidRequest` naming `param` for a grammar that cannot be followed. May take a second."""
    try:
        _try_over_bytes(grammar, tokenizer)
    except GrammarError as error:
        raise InvalidRequest(f"{param} cannot be followed: {error}.", param) from None


@lru_cache(_KEPT)
def _try_over_bytes(grammar: Grammar, tokenizer: Tokenizer) -> None:
    new_matcher(grammar, tokenizer, LLTokenizer("byte"))


@dataclass(frozen=True, slots=True)
class Words:
    """What a model's tokens are. vocab_size: the model's, which `eos_token_ids` are below."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: Collection[int]


class Matchers:
    """Makes the matchers of one engine, and their masks. `load` is called once, in a thread, when `prepare` is or else
    with the first grammar."""

    def __init__(self, load: Callable[[], Words]) -> None:
        self._load = load
        self._eos_token_ids: list[int] = []
        self._never: list[int] = []
        self._lock = threading.Lock()
        # The first matcher of each grammar, which the others are copies of.
        self._compiled = lru_cache(_KEPT)(self._compile)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, "grammar")

    @cached_property
    def _mask_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    @cached_property
    def _vocabulary(self) -> tuple[Tokenizer, LLTokenizer, int]:
        """Also the words of a mask. For a large vocabulary it holds the interpreter's lock for a second."""
        words = self._load()
        tokenizer = words.tokenizer
        self._eos_token_ids = sorted(words.eos_token_ids)
        text, size = tokenizer.to_json(), max(words.vocab_size, tokenizer.vocab_size)
        eos = [token_id for token_id in self._eos_token_ids if token_id < tokenizer.vocab_size]
        if not eos:  # llguidance needs one: a token that is never allowed
            self._never = eos = [tokenizer.vocab_size]
            text, size = _with_token(text, eos[0]), max(size, eos[0] + 1)
        return tokenizer, LLTokenizer(text, size, eos), -(-size // 32)

    def prepare(self) -> Future[object]:
        """Make ready, in a thread, what all grammars need: none will pause the steps of other requests for it."""
        return self._pool.submit(self._find_vocabulary)

    def _find_vocabulary(self) -> tuple[Tokenizer, LLTokenizer, int]:
        with self._lock:
            return self._vocabulary

    def start(self, params: SamplingParams) -> Future[Matcher]:
        """The matcher of `params.grammar`, or a `GrammarError`. Returns at once."""
        return self._pool.submit(self._make, params)

    def _make(self, params: SamplingParams) -> Matcher:
        if params.grammar is None:
            raise ValueError("no grammar")
        matcher = self._compiled(params.grammar, params.reasoning).deep_copy()
        never = [*self._never, *(self._eos_token_ids if params.ignore_eos else ())]
        early = [*self._never, *self._eos_token_ids, *params.stop_token_ids]
        return _TokenMatcher(matcher, params, early, never)

    def _compile(self, grammar: Grammar, reasoning: Reasoning | None) -> LLMatcher:
        tokenizer, vocabulary, _ = self._find_vocabulary()
        try:
            return new_matcher(grammar, tokenizer, vocabulary, reasoning)
        except GrammarError as error:
            raise GrammarError(f"The form of the output cannot be followed: {error}.") from None

    def start_masks(self, entries: Sequence[tuple[int, Matcher]]) -> Callable[[], TokenMasks]:
        """Begin with `masks`, in a thread if they are large; what is returned waits for them. Nothing else may be done
        with these matchers before."""
        if len(entries) * self._vocabulary[2] <= _SMALL:
            return partial(self.masks, entries)
        return self._mask_thread.submit(self.masks, entries).result

    def masks(self, entries: Sequence[tuple[int, Matcher]]) -> TokenMasks:
        """The masks of a step's entries. One whose matcher turns out to have ended or failed gets none."""
        live = [(entry, each) for entry, each in entries if isinstance(each, _TokenMatcher) and not each.over]
        if not live:
            return TokenMasks([], bytearray())
        _, _, words = self._vocabulary
        bits = bytearray(4 * words * len(live))
        pointer = ctypes.addressof(ctypes.c_char.from_buffer(bits))
        end = perf_counter() + _ALONE
        for index, (_, each) in enumerate(live):
            if perf_counter() > end:
                remaining = [(other.state, place) for place, (_, other) in enumerate(live)][index:]
                self._executor.unsafe_compute_mask_ptr(remaining, pointer, 4 * words, len(live))
                break
            each.state.unsafe_compute_mask_ptr(pointer + 4 * words * index, 4 * words)
        view = memoryview(bits).cast("I")  # of which reading a word takes a fraction of what it takes of an array
        kept = [i for i, (_, each) in enumerate(live) if each.settle(view[i * words : (i + 1) * words])]
        if len(kept) < len(live):
            bits = bytearray().join(bits[4 * words * index : 4 * words * (index + 1)] for index in kept)
        return TokenMasks([live[index][0] for index in kept], bits)


def _with_token(tokenizer_json: str, token_id: int) -> str:
    """With one more special token, of this id."""
    tokenizer = json.loads(tokenizer_json)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": token_id, "content": "<|no end|>", "special": True, **flags})
    return json.dumps(tokenizer)


class _TokenMatcher:
    """Implements `core.Matcher`. `early` ids are not allowed before `min_tokens` tokens, `never` ids at no time."""

    def __init__(self, state: LLMatcher, params: SamplingParams, early: list[int], never: list[int]) -> None:
        self.ended = False
        self.error: str | None = None
        self.state = state
        self._params = params
        self._early, self._never = _words_without(early), _words_without(never)
        self._num_tokens = 0
        self._latest: deque[int] = deque(maxlen=MAX_BAD_WORD - 1)

    @property
    def over(self) -> bool:
        return self.ended or self.error is not None

    def accept(self, token_id: int) -> None:
        """See `core.Matcher`."""
        self._num_tokens += 1
        if self._params.bad_words:
            self._latest.append(token_id)
        self.state.consume_token(token_id)
        self._look()

    def settle(self, mask: memoryview[int]) -> bool:
        """Take a mask that was made, in 32-bit words: remove from it what must not come. Returns whether there is a
        token that may; if not, the matcher has ended or failed."""
        self._look()
        if self.ended:
            return False
        params = self._params
        for word, kept in self._early if self._num_tokens < params.min_tokens else self._never:
            mask[word] &= kept
        if params.bad_words:
            for word, kept in _words_without(self._bad_ends()):
                mask[word] &= kept
        if (allowed := params.allowed_token_ids) is not None:
            words = np.frombuffer(mask, dtype=np.uint32)
            words &= _bits(allowed, len(words))
        if any(mask[:64]) or np.frombuffer(mask, dtype=np.uint32).any():  # of the lowest ids one is allowed mostly
            return True
        self.ended = self.state.is_accepting()
        if not self.ended:
            self.error = (
                "Nothing can be generated: of the tokens that may follow by the form of the output, allowed_token_ids, "
                "bad_words, and stop tokens before min_tokens leave none."
            )
        return False

    def _bad_ends(self) -> list[int]:
        """The tokens that would end a bad word now."""
        latest = tuple(self._latest)
        return [word[-1] for word in self._params.bad_words if latest[len(latest) - len(word) + 1 :] == word[:-1]]

    def _look(self) -> None:
        self.ended = self.state.is_stopped()  # also after an error
        if self.ended and self.state.is_error():
            self.error = f"The grammar failed: {_first_line(self.state.get_error())}."


def _words_without(token_ids: Collection[int]) -> list[tuple[int, int]]:
    """The words of a mask that hold these tokens, and all other bits of them."""
    bits: dict[int, int] = {}
    for token_id in token_ids:
        bits[token_id // 32] = bits.get(token_id // 32, 0) | 1 << token_id % 32
    return [(word, 0xFFFFFFFF ^ each) for word, each in bits.items()]


@lru_cache(_KEPT)
def _bits(token_ids: tuple[int, ...], num_words: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    ids = np.array(token_ids, dtype=np.uint32)
    bits = np.zeros(num_words, dtype=np.uint32)
    np.bitwise_or.at(bits, ids // 32, np.uint32(1) << ids % 32)
    return bits


def new_matcher(
    grammar: Grammar, tokenizer: Tokenizer, vocabulary: LLTokenizer, reasoning: Reasoning | None = None
) -> LLMatcher:
    """Raises `GrammarError`."""
    if not tokenizer.spells_bytes:
        raise GrammarError("the tokens of this model's tokenizer do not stand for bytes, which grammars need")
    size, most = len(grammar.text.encode(errors="replace")), _MAX_LARK_BYTES if grammar.kind == "grammar" else MAX_BYTES
    if size > most:
        raise GrammarError(f"it has {size} bytes, and at most {most} are taken")
    try:
        text = _to_llguidance(grammar, tokenizer)
        if vocabulary.vocab_size < tokenizer.vocab_size:  # bytes stand in for it: any special token, for all of them
            text = re.sub(r"<\[\^?\d[\d,-]*\]>", f"<[{vocabulary.vocab_size - 1}]>", text)
        if reasoning is not None:
            text = _behind_reasoning(text, reasoning, tokenizer)
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=_LIMITS)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise GrammarError(_first_line(str(error))) from None
    if matcher.is_error():
        raise GrammarError(_first_line(matcher.get_error()))
    matcher.compute_bitmask()  # the first one is the slowest, and finds what is too much
    if matcher.is_error():
        raise GrammarError(_first_line(matcher.get_error()))
    return matcher


def _first_line(text: str) -> str:
    """Of an error, with its reason where this stands in a later line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it cannot be followed"]
    if lines[0].startswith("panic"):
        return "it is too large, or beyond what the library can do"
    if lines[0].startswith("NoExtension"):
        return "no tokens of the model spell it"
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return f"{lines[0][:300].rstrip('.:')}{': ' if reason else ''}{reason[:200].rstrip('.')}"


def _to_llguidance(grammar: Grammar, tokenizer: Tokenizer) -> str:
    match grammar.kind:
        case "json_schema":
            schema = msgspec.json.decode(grammar.text, type=dict[str, Any] | Literal[True])
            check_size([schema])
            return LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=JSON_OPTIONS)
        case "regex":
            # Classes such as \d are of ASCII characters, as most mean them.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, 'dws')}/")
        case "choice":
            choices = msgspec.json.decode(grammar.text, type=list[str])
            if not choices:
                raise GrammarError("it has nothing to choose from")
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))
        case "grammar":
            return grammar_from("grammar", grammar.text)
        case "calls":
            return grammar.text
        case "structural_tag":
            return _tags_to_lark(msgspec.json.decode(grammar.text, type=_Tags), tokenizer)


def _behind_reasoning(grammar: str, reasoning: Reasoning, tokenizer: Tokenizer) -> str:
    """A grammar of llguidance's, for what follows the reasoning and line breaks."""
    begin = lark_literal(reasoning.begin, tokenizer)
    lines = [
        "%llguidance {}",
        r"TEXT: /(.|\n)*/",
        rule_up_to("thought", "TEXT", lark_literal(reasoning.end, tokenizer)),
        r"answer: /\n{0,2}/ @answer",
        "start: thought answer" if reasoning.is_open else f"start: @answer | {begin} thought answer",
    ]
    inner = json.loads(grammar)["grammars"][0] if grammar.startswith("{") else {"lark_grammar": grammar}
    top = {"lark_grammar": "\n".join([*lines, ""])}
    return json.dumps({"grammars": [top, {**inner, "name": "answer"}]})


def check_size(schemas: list[Any]) -> None:
    """Raises `GrammarError` for schemas that are too large together."""
    counts = {"properties": 0, "patternProperties": 0}
    rest = list(schemas)
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            for name in counts:
                counts[name] += len(node[name]) if isinstance(node.get(name), dict) else 0
            rest.extend(node.values())
        elif isinstance(node, list):
            rest.extend(node)
    for (name, count), most in zip(counts.items(), (_MAX_PROPERTIES, _MAX_PATTERNS), strict=True):
        if count > most:
            raise GrammarError(f"it has {count} {name}, and at most {most} are taken")


class _Tag(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    schema: dict[str, Any]
    end: str


class _Tags(msgspec.Struct, forbid_unknown_fields=True):
    tags: list[_Tag]
    triggers: list[str] = []
    at_least_one: bool = False
    stop_after_first: bool = False


def _tags_to_lark(spec: _Tags, tokenizer: Tokenizer) -> str:
    """In llguidance's Lark: free text up to and with the first trigger, then what its tags ask for."""
    if not 1 <= len(spec.tags) <= _MAX_TAGS:
        raise GrammarError(f"it has {len(spec.tags)} tags, and from 1 to {_MAX_TAGS} are taken")
    check_size([tag.schema for tag in spec.tags])
    by_trigger = sorted((_trigger(tag, spec.triggers), index) for index, tag in enumerate(spec.tags))
    lines = ["%llguidance {}"]
    names: list[str] = []
    for number, (trigger, group) in enumerate(groupby(by_trigger, key=lambda pair: pair[0])):
        bodies = []
        for _, index in group:
            tag = spec.tags[index]
            schema = json.dumps({**tag.schema, "x-guidance": JSON_OPTIONS})
            rest = lark_literal(tag.begin[len(trigger) :], tokenizer)
            bodies.append(f"{rest} %json {schema} {lark_literal(tag.end, tokenizer)}")
        names.append(str(number))
        first, *others = _pieces(trigger, tokenizer)
        lines.append(f"body_{number}: {' '.join(others)} ({' | '.join(bodies)})")
        lines.append(f"forced_{number}: {first} body_{number}")
        lines.append(rule_up_to(f"text_{number}", "TEXT", first))
        lines.append(f"tag_{number}: text_{number} body_{number}")
    forced, free = ("(" + " | ".join(f"{kind}_{name}" for name in names) + ")" for kind in ("forced", "tag"))
    if spec.stop_after_first:
        start = forced if spec.at_least_one else f"{free} | TEXT"
    else:
        start = f"{forced if spec.at_least_one else ''} {free}* TEXT"
    return LLMatcher.grammar_from_lark("\n".join([*lines, r"TEXT: /(.|\n)*/", f"start: {start}", ""]))


def _trigger(tag: _Tag, triggers: list[str]) -> str:
    found = max((trigger for trigger in triggers or [tag.begin] if tag.begin.startswith(trigger)), key=len, default="")
    if not found:
        raise GrammarError(f"no trigger begins the tag {tag.begin[:100]!r}" if triggers else "a tag's begin is empty")
    return found


def rule_up_to(name: str, words: str, literal: str) -> str:
    """A rule of llguidance's Lark: `words` up to and with the first `literal`. What is lazy ends as soon as it matches;
    with a special token, which words cannot hold, that goes without saying."""
    return f"{name}{'' if literal.startswith('<') else '[lazy]'}: {words} {literal}"


def lark_literal(text: str, tokenizer: Tokenizer) -> str:
    """A text in llguidance's Lark."""
    return " ".join(_pieces(text, tokenizer))


def _pieces(text: str, tokenizer: Tokenizer) -> list[str]:
    """The text as Lark strings and, for special tokens, which the model writes as one token each, their ids."""
    special = {token_id: tokenizer.token_str(token_id) for token_id in tokenizer.special_token_ids}
    places = sorted((text.find(token), -len(token), token_id) for token_id, token in special.items() if token in text)
    if not text or not places:
        return [json.dumps(text)] if text else []
    place, length, token_id = places[0]
    before = [json.dumps(text[:place])] if place else []
    return [*before, f"<[{token_id}]>", *_pieces(text[place - length :], tokenizer)]
