"""Token ids to text as they come, one sequence at a time: characters split over tokens, and stop strings.

The pieces put together are exactly `Tokenizer.decode` of all ids, whatever the ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from miniserve.core import SamplingParams
from miniserve.engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoded(NamedTuple):
    """`text` may be shown now; `num_tokens` of the pushed tokens were used, all of them unless `stop` was met."""

    text: str
    num_tokens: int
    stop: str | None


class Detokenizer:
    """One sequence's text. `prompt_token_ids` give the context of the first token; they are never part of the text, so
    a stop string cannot fire in the prompt."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decoder: _ByteLevelDecoder | _WindowDecoder
        if tokenizer.byte_level:
            self._decoder = _ByteLevelDecoder(tokenizer, params.skip_special_tokens)
        else:
            self._decoder = _WindowDecoder(tokenizer, params.skip_special_tokens, prompt_token_ids)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> Decoded:
        """The text of further tokens, up to the token that completes a stop string.

        Text that may be the beginning of a stop string, and bytes that may be the beginning of a character, are held
        back. A stop string counts from the token after the `min_tokens` first ones.
        """
        pieces = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            piece = self._decoder.push(token_id)
            if self._stops is not None and piece:
                piece, stop = self._stops.push(piece, armed=self._num_tokens > self._min_tokens)
                if stop is not None:
                    pieces.append(piece)
                    return Decoded("".join(pieces), index + 1, stop)
            pieces.append(piece)
        return Decoded("".join(pieces), len(token_ids), None)

    def finish(self) -> Decoded:
        """What was held back; the bytes of a character that never came whole as U+FFFD."""
        text, stop = self._decoder.flush(), None
        if self._stops is not None:
            text, stop = self._stops.push(text, armed=self._num_tokens > self._min_tokens)
            if stop is None:
                text += self._stops.flush()
        return Decoded(text, 0, stop)


class StopStrings:
    """Finds the stop string that is complete first; of two that end at the same character, the longer.

    So the answer does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string met. Only a match that ends in `text` counts, and only where
        `armed`."""
        known = len(self._held)
        text = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops if armed else ():
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            self._held = ""
            end, start, stop = found
            return text[: end if self._include else start], stop
        shown = min(_partial_start(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _partial_start(text: str, stop: str) -> int:
    """Where the longest end of `text` that is a beginning of `stop`, but not all of it, starts."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)


class _ByteLevelDecoder:
    """Byte-level BPE: the text is the UTF-8 decoding of the tokens' bytes, one after the other."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other tokenizer: decode a window of the last tokens twice, without and with the new one, and show the
    difference.

    The window begins at a token whose text was shown before, because these decoders treat the first token apart (they
    strip its leading space). A run of raw bytes is decoded as a whole, since one bad byte in it spoils all of it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        last = prompt_token_ids[-1] if prompt_token_ids else None
        in_sentence = last is not None and last not in self._skipped and not tokenizer.is_byte_fallback(last)
        self._window: list[int] = [last] if in_sentence and last is not None else []
        self._num_shown = len(self._window)
        self._shown = self._decode()

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if self._tokenizer.is_byte_fallback(token_id):
            return ""
        text = self._decode()
        if text == self._shown or text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode()
        return new

    def flush(self) -> str:
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)
