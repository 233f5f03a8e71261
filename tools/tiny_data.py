"""Word problems with worked answers: what the built-in model learns, and the held-out ones it is measured on.

Pure Python, no third-party import, so that an evaluation task can use it without torch:

    for problem in problems("test", seed=0, count=1000):
        prompt = completion_prompt(problem)     # "Question: …\\nAnswer:"
        expected = " " + problem.answer         # worked, the last line is "#### N"

The format is that of gsm8k: a short derivation and the result after `####`. The split follows from the arithmetic and
is not random: a hash of the problem's expression ("17+52", operands of a commutative operation sorted) says whether it
is held out, so no phrasing of a held-out expression is ever the question of a training problem, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tools.tiny_templates import DRAWS

Split = Literal["train", "test"]

HELD_OUT_PERCENT = 10


TEMPLATES: tuple[str, ...] = tuple(DRAWS)


@dataclass(frozen=True)
class Problem:
    """One question with its worked answer.

    `numbers` are the question's numbers in the order in which they appear; `expression` is the arithmetic that decides
    the split; `answer` ends with a line "#### N" and `final` is that N; `distractors` are three other numbers a
    mistaken solver might give, for multiple choice.
    """

    template: str
    numbers: tuple[int, ...]
    expression: str
    question: str
    answer: str
    final: str
    distractors: tuple[str, str, str]


def is_held_out(expression: str) -> bool:
    """Whether problems that ask for this arithmetic belong to the test split."""
    digest = hashlib.sha256(expression.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def _distractors(result: int, numbers: Sequence[int], rng: random.Random) -> tuple[str, str, str]:
    """Three wrong results: slips of one or ten, swapped digits, one of the question's own numbers.

    None of them is how the right result begins: with a token per digit, "15" is as likely as "158".
    """
    digits = str(result)
    near = [result + step for step in (1, -1, 2, -2, 10, -10, 100, -100)]
    slips = [int(digits[1::-1] + digits[2:]), int(digits[::-1]), sum(numbers), *numbers]
    rng.shuffle(near)
    rng.shuffle(slips)
    wrong = list(
        dict.fromkeys(n for n in (*near[:1], *slips[:2], *near[1:]) if n >= 0 and not digits.startswith(str(n)))
    )[:3]
    return str(wrong[0]), str(wrong[1]), str(wrong[2])


def draw_problem(split: Split, rng: random.Random, templates: Sequence[str] = TEMPLATES) -> Problem:
    """One problem of the split: templates are equally likely, numbers are redrawn until they fall into the split."""
    template = rng.choice(templates)
    draft = DRAWS[template](rng)
    while is_held_out(draft.expression) != (split == "test"):
        draft = DRAWS[template](rng)
    return Problem(
        template=template,
        numbers=draft.numbers,
        expression=draft.expression,
        question=draft.question,
        answer=f"{draft.working}\n#### {draft.result}",
        final=str(draft.result),
        distractors=_distractors(draft.result, draft.numbers, rng),
    )


def problems(split: Split, seed: int, count: int, templates: Sequence[str] = TEMPLATES) -> Iterator[Problem]:
    """`count` problems, the same for the same arguments; no question occurs twice.

    Raises ValueError for an unknown split or template.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    if unknown := set(templates) - set(TEMPLATES):
        raise ValueError(f"unknown templates: {', '.join(sorted(unknown))}")
    rng = random.Random(f"{split}:{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        problem = draw_problem(split, rng, templates)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def completion_prompt(problem: Problem, shots: Sequence[Problem] = ()) -> str:
    """The raw prompt: solved examples, if any, then the question and "Answer:"; the model goes on with " " + answer."""
    solved = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{solved}Question: {problem.question}\nAnswer:"


def chat_messages(problem: Problem) -> list[dict[str, str]]:
    """The problem as the messages of a chat completion."""
    return [{"role": "user", "content": problem.question}]


def final_answer(text: str) -> str | None:
    """The digits after the first "####" of a model's output, or None if there is no result."""
    _, mark, rest = text.partition("####")
    words = rest.split()
    return words[0] if mark and words and words[0].isdigit() else None


def multiple_choice(problem: Problem) -> tuple[str, list[str], int]:
    """The problem as (context, four continuations, index of the right one), for a comparison of loglikelihoods.

    The context holds the derivation up to "####": the model is asked which result follows from it.
    """
    working, _, _ = problem.answer.rpartition(" ")
    options = sorted({problem.final, *problem.distractors}, key=int)
    return f"{completion_prompt(problem)} {working}", [f" {option}" for option in options], options.index(problem.final)
