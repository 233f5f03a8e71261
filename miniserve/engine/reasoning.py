"""Where a model's reasoning is in its output: at the beginning, between two markers, of which the prompt may hold the
first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miniserve.core import Reasoning
from miniserve.engine.call_reader import CallReader, Steps


@dataclass(frozen=True, slots=True)
class ReasoningDialect:
    """`always`: the model reasons though neither the prompt nor its output may say so."""

    begin: str
    end: str
    always: bool = False

    def after(self, prompt: str, continued: str | None = None) -> Reasoning | None:
        """What the output may begin with behind a prompt's text; None where reasoning is over. `continued`: what the
        answer's own text already has at the prompt's end."""
        if continued is not None:
            is_open = self.begin in continued.rpartition(self.end)[2]
            return Reasoning(self.begin, self.end, True) if is_open else None
        prompt = prompt.rstrip()
        if prompt.endswith(self.end):
            return None
        return Reasoning(self.begin, self.end, self.always or prompt.endswith(self.begin))


REASONING_DIALECTS: Mapping[str, ReasoningDialect] = {
    "qwen3": ReasoningDialect("<think>", "</think>"),
    "deepseek_r1": ReasoningDialect("<think>", "</think>", always=True),
}


def reasoning_dialect(template: str) -> ReasoningDialect | None:
    """That of a model, as its chat template tells."""
    dialect = REASONING_DIALECTS["qwen3"]
    return dialect if dialect.end in template else None


class ReasoningSplit:
    """Text in pieces, to the reasoning with its markers and what follows it."""

    def __init__(self, reasoning: Reasoning) -> None:
        self.inside = reasoning.is_open
        self.over = False
        self._thought: list[str] = []
        self._said: list[str] = []
        self._reader = CallReader({})
        self._steps = self._read(reasoning)

    def push(self, text: str) -> tuple[str, str]:
        """What came of each. Text that may be the beginning of a marker is held back."""
        self._reader.feed(text)
        next(self._steps, None)
        parts = "".join(self._thought), "".join(self._said)
        self._thought.clear()
        self._said.clear()
        return parts

    def flush(self) -> tuple[str, str]:
        self._reader.closed = True
        return self.push("")

    def _read(self, reasoning: Reasoning) -> Steps[None]:
        if (yield from self._reader.take(reasoning.begin)):
            self._thought.append(reasoning.begin)
            self.inside = True
        if self.inside:
            end = yield from self._reader.until((reasoning.end,), self._thought.append)
            self._thought.append(end)
        self.inside, self.over = False, True
        yield from self._reader.until((), self._said.append)
