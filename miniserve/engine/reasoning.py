"""Where a model's reasoning is in its output: at the beginning, between two markers, of which the prompt may hold the
first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miniserve.core import Reasoning


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
        self._reasoning = reasoning
        self._began: bool | None = None  # None: not known yet
        self._held = ""
        self.over = False

    @property
    def inside(self) -> bool:
        return not self.over and (self._reasoning.is_open or self._began is True)

    def push(self, text: str) -> tuple[str, str]:
        """What came of each. Text that may be the beginning of a marker is held back."""
        if self.over:
            return "", text
        text, self._held = self._held + text, ""
        begin, end = self._reasoning.begin, self._reasoning.end
        if self._began is None:
            if text != begin and begin.startswith(text):
                self._held = text
                return "", ""
            self._began = self._reasoning.is_open or text.startswith(begin)
            if not self._began:
                self.over = True
                return "", text
        at = text.find(end)
        if at >= 0:
            self.over = True
            return text[: at + len(end)], text[at + len(end) :]
        num_held = num_begun(text, end)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], ""

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held, "") if self.inside else ("", held)


def num_begun(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
