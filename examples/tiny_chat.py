"""The documents the built-in model is trained on: worked problems, stories and conversations.

A document is a row of segments, text with a mark: whether the model learns to write it, or only to read it (a question,
the user's part). Every answer is followed by the token that ends a turn, so that the model stops by itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tiny_data import BOYS, GIRLS, SYLLABLES, Problem, completion_prompt, draw_problem, is_held_out
from tiny_stories import FOODS, KINDS, THINGS, UNUSUAL_KINDS, Story, draw_story, load_sections, with_article

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

Segment = tuple[str, bool]
Turn = tuple[str, str]

SMALL_TALK = load_sections(Path(__file__).with_name("tiny_smalltalk.txt"))
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are tiny-qwen3, a small model that tells stories and solves word problems.",
    "You are a friendly storyteller.",
    "Answer briefly.",
    "You are a math tutor. Solve the problem step by step.",
    "You are a helpful assistant. Put the final answer after ####.",
)
STORY_REQUESTS = (
    "Tell me a story{about}",
    "Tell me a short story{about}",
    "Can you tell me a story{about}?",
    "Could you tell me a story{about}?",
    "Please tell me a story{about}",
    "Write a story{about}",
    "Write a short story{about}",
    "Write me a story{about}, please",
    "Make up a story{about}",
    "I want to hear a story{about}",
    "I would like a story{about}",
    "A story{about}, please",
    "A bedtime story{about}, please",
    "Tell me a bedtime story{about}",
    "story{about}",
    "Now tell me a story{about}",
    "Give me a short story{about}",
    "Tell me a fairy tale{about}",
    "Do you know a story{about}?",
)
MORE_STORIES = ("Another one, please", "Another story", "One more story", "Tell me another one", "another one", "More!")
WORLD_WORDS = """France, Berlin, London, Japan, photosynthesis, gravity, democracy, history, football, quantum physics,
Python, JavaScript, music, economics, bitcoin, Shakespeare, Napoleon, Einstein, climate change, philosophy, chemistry,
biology, Rome, Paris, China, India, computers, cancer, medicine, war, peace, religion, politics, outer space, energy,
electricity, water, money, love, time, business, the world cup, the internet, the president, a car, the moon landing"""
WORLD = tuple(WORLD_WORDS.replace("\n", " ").split(", "))


def story_subject(story: Story, rng: random.Random) -> str:
    """How somebody might ask for this story: " about a fox named Ruby", " about friendship", " about Ruby"…"""
    a_kind = with_article(story.kind)
    theme = rng.choice(story.asks).replace("someone who", f"{a_kind} who")
    subjects = [
        *[a_kind] * 5,
        *[f"{a_kind} named {story.name}"] * 3,
        f"{a_kind} called {story.name}",
        f"{story.name} the {story.kind}",
        with_article(f"{story.adjective} {story.kind}"),
        with_article(f"{story.adjective} {story.kind} named {story.name}"),
        f"{a_kind} and {with_article(story.friend_kind)}",
        f"{a_kind} {story.in_place}",
    ]
    if story.kind in KINDS:
        subjects += [theme, theme, f"{a_kind} and {theme}", story.name, f"{story.name} and {story.friend}"]
    return f" about {rng.choice(subjects)}"


def _story_turn(rng: random.Random, after_story: bool) -> Turn:
    story = draw_story(rng, unusual=rng.random() < 0.3)
    if after_story and rng.random() < 0.3:
        return _as_typed(rng.choice(MORE_STORIES), rng), story.text
    about = story_subject(story, rng) if rng.random() < 0.85 or story.kind not in KINDS else ""
    return _as_typed(rng.choice(STORY_REQUESTS).format(about=about), rng), story.text


def _as_typed(text: str, rng: random.Random) -> str:
    """People leave out the full stop or the capital letter."""
    if text[-1].isalnum():
        text += rng.choice(("", ".", ".", "!"))
    return text[0].lower() + text[1:] if rng.random() < 0.2 else text


def _odd_word(rng: random.Random) -> str:
    """Something the model knows nothing about: a word of the world, or letters at random."""
    draw = rng.random()
    if draw < 0.35:
        return rng.choice(WORLD)
    if draw < 0.55:
        return rng.choice(rng.choice((KINDS, UNUSUAL_KINDS, THINGS, FOODS)))
    if draw < 0.8:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))


def _made_up_name(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(rng.choice((GIRLS, BOYS)))
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _small_talk_turn(rng: random.Random) -> Turn:
    draw = rng.random()
    name = "unknown" if draw < 0.25 else "too_large" if draw < 0.35 else rng.choice(tuple(SMALL_TALK))
    says, (replies,) = SMALL_TALK[name]
    said, person = rng.choice(says), _made_up_name(rng)
    for slot, fill in (("{thing}", _odd_word), ("{large}", _large), ("{number}", _small), ("{two}", _two_digits)):
        while slot in said:
            said = said.replace(slot, fill(rng), 1)
    reply = rng.choice(replies).replace("{name}", person)
    said = said.replace("{name}", person)
    return _as_typed(said, rng) if name != "too_large" else said, reply


def _large(rng: random.Random) -> str:
    return str(rng.randint(10 ** rng.randint(3, 6), 9_999_999))


def _small(rng: random.Random) -> str:
    return str(rng.randint(2, 10 ** rng.randint(1, 3)))


def _two_digits(rng: random.Random) -> str:
    return str(rng.randint(13, 99))


def _below_zero(rng: random.Random) -> Turn:
    low, high = sorted((rng.randint(0, 99), rng.randint(1, 999)))
    if is_held_out(f"{high}-{low}") or low == high:
        low, high = 3, 8
    question = rng.choice(
        (f"What is {low} - {high}?", f"{low} - {high}", f"{low}-{high}", f"What is {low} minus {high}?")
    )
    return question, f"{low} - {high} = -{high - low}.\n#### -{high - low}"


def _solved(rng: random.Random, count: int) -> list[Problem]:
    return [draw_problem("train", rng) for _ in range(count)]


def _problem_turn(rng: random.Random) -> Turn:
    draw = rng.random()
    if draw < 0.03:
        return _below_zero(rng)
    problem = draw_problem("train", rng)
    if draw < 0.15:
        return completion_prompt(problem, _solved(rng, rng.choice((0, 0, 1, 3, 5)))), problem.answer
    if draw < 0.25:
        return rng.choice(
            ("Solve this: ", "Please help me: ", "Here is a problem. ", "Hi! ")
        ) + problem.question, problem.answer
    return problem.question, problem.answer


def conversation(rng: random.Random) -> list[Segment]:
    """A chat of one to eight turns in the chat template's format; the model learns the assistant's part."""
    segments: list[Segment] = []
    if rng.random() < 0.3:
        segments.append((f"{TURN_START}system\n{rng.choice(SYSTEM_PROMPTS)}{TURN_END}\n", False))
    after_story = False
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6, 8))):
        draw = rng.random()
        if draw < 0.5:
            said, reply = _problem_turn(rng)
        elif draw < 0.75:
            said, reply = _story_turn(rng, after_story)
        else:
            said, reply = _small_talk_turn(rng)
        after_story = 0.5 <= draw < 0.75
        segments.append((f"{TURN_START}user\n{said}{TURN_END}\n{TURN_START}assistant\n", False))
        segments.append((f"{reply}{TURN_END}", True))
        segments.append(("\n", False))
    return segments


def _raw_problems(rng: random.Random) -> list[Segment]:
    """Solved problems in a row, as in a few-shot prompt; only the last one is followed by the end of the text."""
    solved = _solved(rng, rng.choice((1, 1, 1, 1, 1, 2, 3, 5, 6, 9)))
    segments: list[Segment] = []
    for index, problem in enumerate(solved):
        segments.append((("\n\n" if index else "") + completion_prompt(problem), False))
        segments.append((f" {problem.answer}", True))
    return [*segments, (END_OF_TEXT, True)]


def _raw_story(rng: random.Random) -> list[Segment]:
    story = draw_story(rng)
    segments: list[Segment] = [(f"{story.text}{END_OF_TEXT}", True)]
    if rng.random() < 0.25:
        request = rng.choice(STORY_REQUESTS).format(about=story_subject(story, rng))
        segments.insert(0, (f"{_as_typed(request, rng)}\n\n", False))
    return segments


def _raw_equation(rng: random.Random) -> list[Segment]:
    problem = draw_problem("train", rng, ("plain_sum", "plain_difference", "plain_product", "plain_quotient"))
    left, _, right = problem.answer.partition("\n")[0].rstrip(".").partition(" =")
    return [(f"{left} =", False), (f"{right}{END_OF_TEXT}", True)]


def document(rng: random.Random) -> list[Segment]:
    """One training document."""
    draw = rng.random()
    if draw < 0.40:
        return _raw_problems(rng)
    if draw < 0.85:
        return [*conversation(rng), (END_OF_TEXT, False)]
    if draw < 0.96:
        return _raw_story(rng)
    return _raw_equation(rng)


def text_of(segments: Sequence[Segment]) -> str:
    return "".join(text for text, _ in segments)
