"""Log probabilities in OpenAI's two shapes: four parallel arrays for completions, a list of objects for chat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from miniserve.core import TokenLogprobs
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob


class CompletionLogprobsWriter:
    """The four arrays of one choice, piece by piece. `text_offset` counts characters of the choice's text: those that
    are complete before the token's first byte."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], text: str
    ) -> CompletionLogprobs:
        """The echoed prompt, whose text is `text`; its first entry is None."""
        offsets = self._prompt_offsets(token_ids, text)
        self._offset = len(text)
        self._decoder.reset()
        return self._arrays(token_ids, entries, offsets)

    def generated(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        token_ids = [entry.token_id for entry in entries]
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            if token_id not in self._hidden:
                self._advance(self._tokenizer.token_bytes(token_id))
        return self._arrays(token_ids, entries, offsets)

    def _prompt_offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """A prompt shows its special tokens, except for a BOS that the tokenizer put before it; and a sentencepiece
        tokenizer drops the space before its first word."""
        offsets = []
        at_start = True
        for token_id in token_ids:
            offsets.append(self._offset)
            piece = self._tokenizer.token_bytes(token_id)
            if at_start:
                if token_id in self._tokenizer.special_token_ids and not text.startswith(
                    piece.decode(errors="replace")
                ):
                    continue
                if piece.startswith(b" ") and not text.startswith(" "):
                    piece = piece[1:]
                at_start = False
            self._advance(piece)
        return offsets

    def _advance(self, piece: bytes) -> None:
        self._offset += len(self._decoder.decode(piece))

    def _arrays(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: list[int]
    ) -> CompletionLogprobs:
        return {
            "tokens": [self._tokenizer.token_str(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Keyed by text, with the chosen token among them. Of several ids with the same text the likeliest counts."""
        top: dict[str, float] = {}
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(self._tokenizer.token_str(token_id), logprob)
        chosen = self._tokenizer.token_str(entry.token_id)
        top[chosen] = max(entry.logprob, top.get(chosen, entry.logprob))
        return top


def join(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return {
        "tokens": [token for piece in pieces for token in piece["tokens"]],
        "token_logprobs": [logprob for piece in pieces for logprob in piece["token_logprobs"]],
        "top_logprobs": [top for piece in pieces for top in piece["top_logprobs"]],
        "text_offset": [offset for piece in pieces for offset in piece["text_offset"]],
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for entry in entries:
        top = [_top_logprob(tokenizer, *pair) for pair in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        content.append({**_top_logprob(tokenizer, entry.token_id, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    return {
        "token": tokenizer.token_str(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
