"""The documents of the tasks in this folder, made on the spot: word problems and stories no training run has seen.

lm_eval calls these functions for `custom_dataset: !function local_data.…`, with the task's metadata and that of its
command line (`--metadata '{"count": 100}'`) as arguments, so the tasks need no files, no paths and no network.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

# The checkout: its tools/ makes the data that the built-in model is trained on.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.tiny_data import Split, multiple_choice, problems
from tools.tiny_stories import draw_story

SHOTS = 50


def word_problems(count: int = 1000, seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """`count` held-out problems, and a few training problems to choose few-shot examples from."""
    return {"test": _problem_documents("test", count, seed), "train": _problem_documents("train", SHOTS, seed)}


def _problem_documents(split: Split, count: int, seed: int) -> Dataset:
    documents = []
    for problem in problems(split, seed, count):
        context, choices, gold = multiple_choice(problem)
        documents.append(
            {
                "question": problem.question,
                "answer": problem.answer,
                "context": context,
                "choices": [choice.strip() for choice in choices],
                "gold": gold,
            }
        )
    return Dataset.from_list(documents)


def stories(count: int = 200, seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """`count` stories, from a seed that training does not use."""
    rng = random.Random(f"held out: {seed}")
    return {"test": Dataset.from_list([{"text": draw_story(rng).text} for _ in range(count)])}
