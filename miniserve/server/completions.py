"""`/v1/completions`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from miniserve.core import Completion, SamplingParams
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server import logprobs
from miniserve.server.fields import REFUSED_IN_COMPLETIONS
from miniserve.server.protocol import CompletionRequest, Prompt
from miniserve.server.reply import Answer, GenerationResponse, Header, finish_word
from miniserve.server.responses import CompletionChoice, CompletionLogprobs
from miniserve.server.service import Service


class CompletionAnswer(Answer):
    """Choices are numbered prompt · n + the sequence's index, and listed in that order."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(
        self,
        header: Header,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        token_ids: Sequence[list[int]],
        params: SamplingParams,
        echo: bool,
    ) -> None:
        super().__init__(header, [len(ids) for ids in token_ids])
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._token_ids = token_ids
        self._params = params
        self._echo = echo
        self._writers: dict[int, logprobs.CompletionLogprobsWriter] = {}
        self._pieces: defaultdict[int, list[CompletionChoice]] = defaultdict(list)

    def add(self, number: int, delta: Completion) -> None:
        choice = self._choice(number, delta)
        self._pieces[choice["index"]].append(choice)

    def choices(self) -> list[CompletionChoice]:
        return [self._joined(index) for index in sorted(self._pieces)]

    def pieces(self, number: int, delta: Completion) -> Iterator[CompletionChoice]:
        self.count(number, delta)
        choice = self._choice(number, delta)
        if choice["finish_reason"] is not None and (choice["text"] or choice["logprobs"]):
            yield {**choice, "finish_reason": None, "stop_reason": None}
            choice = {**choice, "text": "", "logprobs": None}
        yield choice

    def _choice(self, number: int, delta: Completion) -> CompletionChoice:
        index = number * self._params.n + delta.index
        writer = self._writers.get(index)
        first = writer is None
        if writer is None:
            skip_special_tokens, prompt_token_ids = self._params.skip_special_tokens, self._token_ids[number]
            writer = logprobs.CompletionLogprobsWriter(self._tokenizer, skip_special_tokens, prompt_token_ids)
            self._writers[index] = writer
        text = delta.text
        pieces: list[CompletionLogprobs] = []
        if first and self._echo:
            prompt = self._prompts[number]
            prompt_text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, False)
            text = prompt_text + text
            if delta.prompt_logprobs is not None:
                pieces.append(writer.prompt(delta.prompt_logprobs, prompt_text))
        if delta.logprobs is not None:
            pieces.append(writer.generated(delta.logprobs))
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs.join(pieces) if pieces else None,
            "finish_reason": finish_word(delta),
            "stop_reason": delta.stop_reason,
        }

    def _joined(self, index: int) -> CompletionChoice:
        pieces = self._pieces[index]
        arrays = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        return {
            "index": index,
            "text": "".join(piece["text"] for piece in pieces),
            "logprobs": None if self._params.logprobs is None else logprobs.join(arrays),
            "finish_reason": pieces[-1]["finish_reason"],
            "stop_reason": pieces[-1]["stop_reason"],
        }


async def respond(service: Service, body: CompletionRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    service.check_alive()
    service.check_model(body.model)
    service.fields.check(body, REFUSED_IN_COMPLETIONS)
    params = service.rules.for_completion(body)
    service.turns.check(len(body.prompt) * params.n)
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    encoded = iter(await service.encode(texts, body.add_special_tokens is not False))
    token_ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    await service.check_prompts(token_ids, params, body)
    header = service.header("cmpl")
    answer = CompletionAnswer(header, service.engine.tokenizer, body.prompt, token_ids, params, bool(body.echo))
    return GenerationResponse(service.generation(token_ids, params, header), answer, body)
