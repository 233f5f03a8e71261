"""`/v1/completions`: prompts and the texts that continue them, log probabilities in four parallel arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from miniserve.core import Completion, SamplingParams, TokenLogprobs
from miniserve.engine.detokenizer import TextDecoder, text_decoder
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.protocol import CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt
from miniserve.server.reply import ChoicesAnswer, GenerationResponse, finish_word
from miniserve.server.service import Service
from miniserve.server.structured import find_grammar


class CompletionLogprobsWriter:
    """The four arrays of one choice, piece by piece. `text_offset` counts characters of the choice's text: those that
    are complete before the token's first byte."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        prompt_token_ids: Sequence[int],
        name: Callable[[int], str] | None = None,  # what a token is called; None: its text
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name or tokenizer.token_str
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
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Keyed by text, with the chosen token among them. Of several ids with the same text the likeliest counts."""
        top: dict[str, float] = {}
        pairs = zip((*entry.top_ids, entry.token_id), (*entry.top_logprobs, entry.logprob), strict=True)
        for token_id, logprob in pairs:
            name = self._name(token_id)
            top[name] = max(logprob, top.get(name, logprob))
        return top


def _join(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return {
        "tokens": [token for piece in pieces for token in piece["tokens"]],
        "token_logprobs": [logprob for piece in pieces for logprob in piece["token_logprobs"]],
        "top_logprobs": [top for piece in pieces for top in piece["top_logprobs"]],
        "text_offset": [offset for piece in pieces for offset in piece["text_offset"]],
    }


class CompletionAnswer(ChoicesAnswer):
    """The choices are listed in the order of their prompts."""

    id_prefix = "cmpl-"
    whole_kind = chunk_kind = "text_completion"
    prompt_in_choice = True

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        token_ids: Sequence[list[int]],
        params: SamplingParams,
        body: CompletionRequest,
    ) -> None:
        super().__init__(model, tokenizer, token_ids, params, body)
        self._prompts = prompts
        self._echo = bool(body.echo)
        self._num_wanted = body.n or 1
        self._with_logprobs = body.logprobs is not None
        self._sums: defaultdict[int, float] = defaultdict(float)  # of the log probabilities, by choice
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._pieces: defaultdict[int, list[CompletionChoice]] = defaultdict(list)

    def add(self, number: int, delta: Completion) -> None:
        self.count(number, delta)
        choice = self._choice(number, delta)
        self._pieces[choice["index"]].append(choice)
        self._sums[choice["index"]] += sum(entry.logprob for entry in delta.logprobs or ())

    def choices(self) -> Iterator[CompletionChoice]:
        """Of a prompt's best_of the n likeliest, the likeliest first."""
        indexes, best_of = sorted(self._pieces), self._params.n
        for first in range(0, len(indexes), best_of):
            group = indexes[first : first + best_of]
            if self._num_wanted < best_of:
                group = sorted(group, key=lambda index: -self._sums[index])[: self._num_wanted]
            yield from (self._joined(self._pieces[index]) for index in group)

    def pieces(self, number: int, delta: Completion) -> Iterator[CompletionChoice]:
        self.count(number, delta)
        choice = self._choice(number, delta)
        if choice["finish_reason"] is not None and (choice["text"] or choice["logprobs"]):
            yield {**choice, "finish_reason": None, "stop_reason": None}
            choice = {**choice, "text": "", "logprobs": None}
        yield choice

    def text_choice(self, index: int, text: str) -> CompletionChoice | None:
        if self._echo or self._with_logprobs:
            return None
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def _choice(self, number: int, delta: Completion) -> CompletionChoice:
        text, logprobs = delta.text, None
        if self._echo or self._with_logprobs:
            text, logprobs = self._annotated(number, delta)
        return {
            "index": self.index(number, delta),
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_word(delta),
            "stop_reason": delta.stop_reason,
        }

    def _annotated(self, number: int, delta: Completion) -> tuple[str, CompletionLogprobs | None]:
        """The text with the prompt's, where that is to be repeated, and the arrays that were asked for."""
        index, text = self.index(number, delta), delta.text
        arrays: list[CompletionLogprobs] = []
        if is_first := index not in self._writers:
            self._writers[index] = CompletionLogprobsWriter(
                self._tokenizer, self._params.skip_special_tokens, self.token_ids[number], self.token_name
            )
        writer = self._writers[index]
        if is_first and self._echo:
            prompt = self._prompts[number]
            prompt_text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, False)
            text = prompt_text + text
            if delta.prompt_logprobs is not None and self._with_logprobs:
                arrays.append(writer.prompt(delta.prompt_logprobs, prompt_text))
        if delta.logprobs is not None and self._with_logprobs:
            arrays.append(writer.generated(delta.logprobs))
        return text, _join(arrays) if arrays else None

    def _joined(self, pieces: Sequence[CompletionChoice]) -> CompletionChoice:
        arrays = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        text = "".join(piece["text"] for piece in pieces)
        return {**pieces[-1], "text": text, "logprobs": _join(arrays) if self._with_logprobs else None}


async def respond(service: Service, body: CompletionRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    params = service.rules.for_completion(body)
    if (found := find_grammar(body)) is not None:
        await service.check_grammar(*found)
    service.turns.check(len(body.prompt), params.n)
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    truncates = body.truncate_prompt_tokens is not None
    encoded = iter(await service.encode(texts, body.add_special_tokens is not False, any_length=truncates))
    prompts: list[Prompt] = []
    token_ids = []
    for prompt in body.prompt:
        ids = next(encoded) if isinstance(prompt, str) else prompt
        token_ids.append(service.truncate(ids, body))
        prompts.append(prompt if len(token_ids[-1]) == len(ids) else token_ids[-1])
    answer = CompletionAnswer(service.model, service.engine.tokenizer, prompts, token_ids, params, body)
    return await service.respond(answer, params, body)
