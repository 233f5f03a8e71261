"""Log probabilities in OpenAI's two shapes: four parallel arrays for completions, a list of objects for chat."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from miniserve.core import TokenLogprobs
from miniserve.engine.detokenizer import TextDecoder, text_decoder
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob


class CompletionLogprobsWriter:
    """The four arrays of one choice, piece by piece. `text_offset` counts characters of the choice's text: those that
    are complete before the token's first byte."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._prompt_token_ids = prompt_token_ids
        self._offset = 0

    @cached_property
    def _decoder(self) -> TextDecoder:
        return text_decoder(self._tokenizer, self._skip_special_tokens, self._prompt_token_ids)

    def prompt(self, entries: Sequence[TokenLogprobs | None], text: str) -> CompletionLogprobs:
        """The echoed prompt, whose text is `text`; its first entry is None."""
        self._offset = len(text)
        return self._arrays(self._prompt_token_ids, entries, self._prompt_offsets(text))

    def generated(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        token_ids = [entry.token_id for entry in entries]
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token_id))
        return self._arrays(token_ids, entries, offsets)

    def _prompt_offsets(self, text: str) -> list[int]:
        """A prompt shows its special tokens, except for those that the tokenizer put around it."""
        offsets = []
        decoder = text_decoder(self._tokenizer, skip_special_tokens=False)
        offset, at_start = 0, True
        for token_id in self._prompt_token_ids:
            offsets.append(min(offset, len(text)))
            is_special = token_id in self._tokenizer.special_token_ids
            if at_start and is_special and not text.startswith(self._tokenizer.token_str(token_id)):
                continue
            at_start = False
            offset += len(decoder.push(token_id))
        return offsets

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
