"""Token ids to text as they come, one sequence at a time: characters split over tokens, and stop strings.

The pieces put together are `Tokenizer.decode` of prompt and answer without that of the prompt, whatever the ids. Two
things differ, since what was shown cannot be taken back: a character that the prompt begins and the answer completes is
whole in the answer; and where a run of raw bytes breaks, characters before the break stay as they were shown (the
library makes U+FFFD of all bytes of such a run).
"""

from __future__ import annotations

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from miniserve.core import SamplingParams
from miniserve.engine.reasoning import ReasoningSplit
from miniserve.engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHAR_BYTES = 4


class Decoded(NamedTuple):
    """`text` may be shown now; `num_tokens` of the pushed tokens were used, all of them unless `stop` was met."""

    text: str
    num_tokens: int
    stop: str | None


class Detokenizer:
    """One sequence's text. `prompt_token_ids` give the context of the first token; they are never part of the text, so
    a stop string cannot fire in the prompt."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decoder = text_decoder(
            tokenizer, params.skip_special_tokens, prompt_token_ids, params.shown_special_tokens
        )
        # A prompt may end within a character: its own text has U+FFFD for what is there. Where the answer does not
        # complete the character, they are not repeated.
        self._begun = _REPLACEMENT * self._decoder.num_begun
        self._reasoning = ReasoningSplit(params.reasoning) if params.reasoning and params.stop else None
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        # Special tokens that the text hides, but whose text is a stop string.
        hidden = params.stop if params.skip_special_tokens else ()
        stop_tokens = {tokenizer.special_token_id(stop): stop for stop in hidden}
        self._stop_tokens = {token_id: stop for token_id, stop in stop_tokens.items() if token_id is not None}
        self._params = params
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> Decoded:
        """The text of further tokens, up to the token that completes a stop string.

        Text that may be the beginning of a stop string, and bytes that may be the beginning of a character, are held
        back. A stop string counts from the token after the `min_tokens` first ones, and outside reasoning.
        """
        if self._stops is None and not self._begun:
            return Decoded("".join(map(self._decoder.push, token_ids)), len(token_ids), None)
        pieces = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            piece = self._without_begun(self._decoder.push(token_id))
            if self._stops is not None:
                piece, stop = self._match(self._stops, token_id, piece)
                if stop is not None:
                    pieces.append(piece)
                    return Decoded("".join(pieces), index + 1, stop)
            pieces.append(piece)
        return Decoded("".join(pieces), len(token_ids), None)

    def finish(self) -> Decoded:
        """What was held back; the bytes of a character that never came whole as U+FFFD."""
        text, stop = self._without_begun(self._decoder.flush()), None
        if self._stops is not None:
            text, stop = self._until_stop(self._stops, text, is_last=True)
            if stop is None:
                text += self._stops.flush()
        return Decoded(text, 0, stop)

    def _without_begun(self, text: str) -> str:
        if text and self._begun:
            text, self._begun = text.removeprefix(self._begun), ""
        return text

    @property
    def _armed(self) -> bool:
        return self._num_tokens > self._params.min_tokens

    def _match(self, stops: StopStrings, token_id: int, piece: str) -> tuple[str, str | None]:
        if piece:
            return self._until_stop(stops, piece)
        stop = self._stop_tokens.get(token_id)
        if stop is None or not self._armed or (self._reasoning is not None and self._reasoning.inside):
            return "", None
        held = self.finish()
        if held.stop is not None:
            return held.text, held.stop
        return held.text + (stop if self._params.include_stop_str_in_output else ""), stop

    def _until_stop(self, stops: StopStrings, text: str, *, is_last: bool = False) -> tuple[str, str | None]:
        thought = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
            if is_last:
                thought, text = map("".join, zip((thought, text), self._reasoning.flush(), strict=True))
        text, stop = stops.push(text, armed=self._armed)
        return thought + text, stop


class StopStrings:
    """Finds the stop string that is complete first; of two that end at the same character, the longer.

    So the answer does not depend on how the text is cut into pieces. An automaton (Aho and Corasick's) takes one step a
    character, however many and long the strings are. A state is the longest beginning of a stop string with which the
    text ends. States are made when the text first comes to them, and kept in flat lists, which cost the garbage
    collector nothing.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = sorted(set(stops))
        self._include = include
        self._next: dict[tuple[int, str], int] = {}
        # By state, 0 being the empty beginning: its length, the stop strings that begin so, the state of the next
        # shorter beginning with which the text ends, how much of the text may become a stop string yet, and the longest
        # stop string with which the text ends.
        self._depth = [0]
        self._range = [(0, len(self._stops))]
        self._shorter = [0]
        self._num_held = [0]
        self._complete: list[str | None] = [None]
        self._state = 0
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string met. Only a match that ends in `text` counts, and only where
        `armed`."""
        state, find = self._state, self._next.get
        num_held = len(self._held)
        held_and_text = self._held + text
        for end, char in enumerate(text, num_held + 1):
            found = find((state, char))
            state = self._step(state, char) if found is None else found
            stop = self._complete[state]
            if stop is not None and armed:
                self._held, self._state = "", 0
                return held_and_text[: end if self._include else end - len(stop)], stop
        self._state = state
        shown = len(held_and_text) - self._num_held[state]
        self._held = held_and_text[shown:]
        return held_and_text[:shown], None

    def flush(self) -> str:
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
        passed = []
        while (target := self._next.get((state, char))) is None:
            passed.append(state)
            if state == 0:
                target = 0
                break
            state = self._shorter[state]
        for at in reversed(passed):  # from the shortest: each is what the next one falls back to
            low, high = self._going_on(at, char)
            if low < high:
                target = self._add(self._depth[at] + 1, low, high, target)
            self._next[at, char] = target
        return target

    def _going_on(self, state: int, char: str) -> tuple[int, int]:
        """Those of the state's stop strings that have `char` next, as a range."""
        (low, high), depth = self._range[state], self._depth[state]
        if high - low == 1:
            return low, low + self._stops[low].startswith(char, depth)

        def next_char(stop: str) -> str:
            return stop[depth : depth + 1]

        low = bisect_left(self._stops, char, low, high, key=next_char)
        return low, bisect_right(self._stops, char, low, high, key=next_char)

    def _add(self, depth: int, low: int, high: int, shorter: int) -> int:
        is_complete = len(self._stops[low]) == depth
        self._depth.append(depth)
        self._range.append((low, high))
        self._shorter.append(shorter)
        self._num_held.append(self._num_held[shorter] if is_complete and high - low == 1 else depth)
        self._complete.append(self._stops[low] if is_complete else self._complete[shorter])
        return len(self._depth) - 1


def text_decoder(
    tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = (), shown: Sequence[int] = ()
) -> TextDecoder:
    """Token ids of one sequence to its text, without regard to stop strings: of the text that follows a prompt, or of a
    text of its own without one. `shown`: not skipped nevertheless."""
    skipped = tokenizer.special_token_ids.difference(shown) if skip_special_tokens else frozenset()
    return (_ByteLevelDecoder if tokenizer.byte_level else _WindowDecoder)(tokenizer, skipped, prompt_token_ids)


class _ByteLevelDecoder:
    """Byte-level BPE: the text is the UTF-8 decoding of the tokens' bytes, one after the other."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        end = b""
        for token_id in reversed(prompt_token_ids):
            if len(end) >= _MAX_CHAR_BYTES:
                break
            if token_id not in skipped:
                end = tokenizer.token_bytes(token_id) + end
        self._utf8.decode(end)
        self._begun = self._utf8.getstate()[0]  # bytes of a character that is not whole yet
        self.num_begun = len(self._begun.decode(errors="replace"))  # the prompt's text ends with so many U+FFFD for it

    def push(self, token_id: int) -> str:
        """The characters that are whole with this token."""
        if token_id in self._skipped:
            return ""
        if not self._begun and (whole := self._tokenizer.token_text(token_id)) is not None:
            return whole
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._begun = self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        """The bytes at the end that are no character, as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other tokenizer: decode a window of the last tokens twice, without and with the new one, and show the
    difference.

    The window begins at a token whose text was shown before, because these decoders treat the first token apart (they
    strip its leading space). Raw bytes are decoded once they are whole characters; where they are none, with the token
    that ends their run.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window, run = self._context(prompt_token_ids)
        self._begun = run[_num_whole(run) :]  # bytes of the last run that are no whole characters yet
        self.num_begun = len(self._begun)  # the prompt's text ends with so many U+FFFD for them
        self._num_shown = len(self._window) - len(self._begun)
        self._shown = self._decode(self._window[: self._num_shown])

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or not self._tokenizer.token_bytes(token_id):
            return ""
        self._window.append(token_id)
        byte = self._tokenizer.fallback_bytes.get(token_id)
        if byte is not None:
            self._begun += byte
            if len(self._begun) > _MAX_CHAR_BYTES or _num_whole(self._begun) < len(self._begun):
                return ""
            self._begun = b""
        new = self._new()
        if not new:
            if self._num_shown:
                self._window.pop()
            return ""
        num_new = len(self._window) - self._num_shown
        if new.endswith(_REPLACEMENT) and num_new < _MAX_CHAR_BYTES and not self._tokenizer.fallback_bytes:
            return ""  # perhaps a part of a character
        self._window = self._window[self._num_shown :]
        self._num_shown = num_new
        self._shown = self._decode(self._window)
        self._begun = b""
        return new

    def flush(self) -> str:
        return self._new()

    def _new(self) -> str:
        if self._begun:  # a broken run, which would spoil its characters that were shown, too
            return self._decode(self._window[self._num_shown :])
        return self._decode(self._window)[len(self._shown) :]

    def _context(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """The prompt's last token that counts, and the run of raw bytes behind it, which is decoded as a whole."""
        context, run = [], b""
        for token_id in reversed(prompt_token_ids):
            if token_id in self._skipped or not self._tokenizer.token_bytes(token_id):
                continue
            context.append(token_id)
            byte = self._tokenizer.fallback_bytes.get(token_id)
            if byte is None:
                break
            run += byte
        return context[::-1], run[::-1]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _num_whole(run: bytes) -> int:
    """How many of the bytes are whole characters, up to the first that are none."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(run)


TextDecoder = _ByteLevelDecoder | _WindowDecoder
