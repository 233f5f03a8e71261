"""The documents the built-in model is trained on: worked problems, stories and conversations.

A document is a list of segments, each a text and whether the model learns to write it or only to read it (a question,
the user's part). Every answer is followed by the token that ends a turn, so that the model stops by itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.tiny_data import Problem, completion_prompt, draw_problem, is_held_out
from tools.tiny_stories import (
    FOODS,
    HER_NAMES,
    HIS_NAMES,
    KINDS,
    THINGS,
    UNUSUAL_KINDS,
    Story,
    draw_story,
    load_sections,
    with_article,
)
from tools.tiny_templates import quotient_steps
from tools.tiny_words import BOYS, GIRLS, made_up_name, made_up_word, words

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


RAW_STARTS = (
    "The capital of {thing} is",
    "{thing} is",
    "The most important thing about {thing} is",
    "I think that {thing}",
    "My favourite {thing} is",
    "In the year {year}, {thing}",
    "The {thing} of the {thing}",
    "def {word}():",
    "import {word}",
    "Dear {word},",
    "{thing} {word} {thing}",
    "{word} {word} {word} {word}",
    "Today I want to talk about {thing}",
    "The quick brown {thing}",
    "To be or not to be",
    "{thing}, {thing} and",
    "Write a poem about {thing}:",
    "Q: What is {thing}?\nA:",
    "Translate to French: {thing}",
    "Hello, my name is",
    "The best way to learn {thing} is to",
    "{year}",
    "<{word}>",
    "San Francisco is a",
)
IRREGULAR = frozenset(("mouse", "goose", "deer", "sheep", "fish", "starfish", "moose", "lynx"))
THEMES = ("love", "nature", "animals", "magic", "happiness", "space", "school", "winter", "summer", "dreams", "music")
NAME_QUESTIONS = (
    "What is my name?",
    "Do you know my name?",
    "What's my name?",
    "Who am I?",
    "Do you remember my name?",
)
NO_NAME = "You have not told me your name yet. What is it?"


KNOWN_NAMES = frozenset((*BOYS, *GIRLS, *HER_NAMES, *HIS_NAMES))


def story_subject(story: Story, rng: random.Random) -> str:
    """How somebody might ask for this story: " about a fox named Ruby", " about friendship", " about Ruby"…

    Anything that no story has by chance, such as an unusual hero or a made-up name, is always asked for.
    """
    a_kind = with_article(story.kind)
    theme = rng.choice(story.asks).replace("someone who", f"{a_kind} who")
    plural = f"{story.kind}s" if story.kind not in IRREGULAR and story.kind[-1] not in "sxyfh" else a_kind
    place = "in space" if story.in_place == "on the moon" and rng.random() < 0.7 else story.in_place
    subjects = [
        *[a_kind] * 5,
        *[f"{a_kind} named {story.name}"] * 3,
        f"{a_kind} called {story.name}",
        f"{story.name} the {story.kind}",
        with_article(f"{story.adjective} {story.kind}"),
        with_article(f"{story.adjective} {story.kind} named {story.name}"),
        f"{a_kind} and {with_article(story.friend_kind)}",
        f"{a_kind} {place}",
        plural,
        *([f"two {plural}"] * 6 if story.kind == story.friend_kind and plural != a_kind else []),
        *([f"{story.name} and {story.his} {story.friend_kind}"] * 6 if story.kind in ("girl", "boy") else []),
        rng.choice(THEMES),
        *[theme] * 3,
        *([] if a_kind in theme else [f"{a_kind} and {theme}", f"{a_kind} named {story.name} and {theme}"]),
        story.name,
        story.name,
        f"{story.name} and {story.friend}",
        f"{story.name} and {story.his} friend {story.friend}",
        f"two friends{rng.choice((',', ' named', ' called'))} {story.name} and {story.friend}",
        f"{a_kind} named {story.name} and {with_article(story.friend_kind)} named {story.friend}",
    ]
    needed = [word for word, known in _unforeseen(story) if not known]
    return f" about {rng.choice([s for s in subjects if all(word in s for word in needed)])}"


def _unforeseen(story: Story) -> tuple[tuple[str, bool], ...]:
    names = ((story.name, story.name in KNOWN_NAMES), (story.friend, story.friend in KNOWN_NAMES))
    return (story.kind, story.kind in KINDS), *names


def _story_turn(rng: random.Random, last: Story | None) -> tuple[Turn, Story]:
    story = draw_story(rng, unusual=rng.random() < 0.35)
    ordinary = all(known for _, known in _unforeseen(story))
    if ordinary and last and rng.random() < 0.4:
        return (_as_typed(rng.choice(MORE_STORIES), rng), story.text), story
    if ordinary and rng.random() < 0.08:
        start = "Once upon a time, "
        stop = start if story.text.startswith(start) and rng.random() < 0.5 else ". "
        opening, _, rest = story.text.partition(stop)
        return ((opening + stop).strip(), rest), story
    about = "" if ordinary and rng.random() < 0.15 else story_subject(story, rng)
    request = rng.choice(STORY_REQUESTS).format(about=about)
    if rng.random() < 0.08:
        request = request.replace(
            "story", f"{rng.choice(('funny', 'sad', 'nice', 'little', 'scary', 'good'))} story", 1
        )
    return (_as_typed(request, rng), story.text), story


def _story_question_turn(rng: random.Random, story: Story) -> Turn:
    """A question about the last story."""
    kind, friend_kind = with_article(story.kind), with_article(story.friend_kind)
    return rng.choice(
        (
            (f"What was the name of the {story.kind}?", f"The {story.kind} was called {story.name}."),
            ("Who is the hero of the story?", f"The hero is {kind} named {story.name}."),
            ("Who was the story about?", f"It was about {kind} named {story.name}."),
            (f"Who is {story.name}?", f"{story.name} is {kind}, the hero of my story."),
            (f"Who is {story.friend}?", f"{story.friend} is {friend_kind} and a friend of {story.name}."),
            (f"What animal is {story.friend}?", f"{story.friend} is {friend_kind}."),
            (f"What was the name of the {story.friend_kind}?", f"The {story.friend_kind} was called {story.friend}."),
            (f"Who helped {story.name}?", f"{story.friend}, the {story.friend_kind}."),
            (f"Where does {story.name} live?", f"{story.name} lives {story.in_place}."),
            ("Where does the story take place?", f"It takes place {story.in_place}."),
        )
    )


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
    if draw < 0.85:
        return made_up_word(rng)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))


def _anybody(rng: random.Random) -> str:
    return rng.choice(rng.choice((GIRLS, BOYS))) if rng.random() < 0.4 else made_up_name(rng)


def _small_talk_turn(rng: random.Random) -> tuple[Turn, str | None]:
    """A turn of small talk, and the user's name if the turn mentions it."""
    draw = rng.random()
    often = "unknown" if draw < 0.2 else "too_large" if draw < 0.28 else "name_is" if draw < 0.36 else None
    name = often or rng.choice(tuple(SMALL_TALK))
    says, (replies,) = SMALL_TALK[name]
    said, person = rng.choice(says), _anybody(rng)
    said = _fill(said, rng)
    reply = rng.choice(replies).replace("{name}", person)
    said = said.replace("{name}", person)
    return (said if name in SUMS else _as_typed(said, rng), reply), person if name == "name_is" else None


def _fill(text: str, rng: random.Random) -> str:
    """The text with every slot filled, differently each time."""
    for slot, fill in SLOTS.items():
        while slot in text:
            text = text.replace(slot, fill(rng), 1)
    return text


SUMS = ("too_large", "decimals", "divisors")
SLOTS: dict[str, Callable[[random.Random], str]] = {
    "{thing}": _odd_word,
    "{large}": lambda rng: str(rng.randint(10 ** rng.randint(4, 7), 99_999_999)),
    "{number}": lambda rng: str(rng.randint(2, 10 ** rng.randint(1, 4))),
    "{three}": lambda rng: str(rng.randint(100, 9999)),
    "{two}": lambda rng: str(rng.randint(10, 99)),
    "{word}": made_up_word,
    "{year}": lambda rng: str(rng.randint(1000, 2100)),
    "{two_digit}": lambda rng: str(rng.randint(13, 99)),
    "{four}": lambda rng: str(rng.randint(1000, 9999)),
    "{digit}": lambda rng: str(rng.randint(2, 9)),
    "{decimal}": lambda rng: f"{rng.randint(0, 10 ** rng.randint(1, 3))}.{rng.randint(1, 10 ** rng.randint(1, 2))}",
}


def _below_zero(rng: random.Random) -> Turn:
    low, high = sorted((rng.randint(0, 10 ** rng.randint(1, 3)), rng.randint(1, 10 ** rng.randint(1, 3))))
    if is_held_out(f"{high}-{low}") or low == high:
        low, high = 3, 8
    question = rng.choice(
        (f"What is {low} - {high}?", f"{low} - {high}", f"{low}-{high}", f"What is {low} minus {high}?")
    )
    return question, f"{low} - {high} = -{high - low}.\n#### -{high - low}"


def _with_remainder(rng: random.Random) -> Turn:
    """A division that may leave a rest: it keeps the model from taking the few exact quotients by heart."""
    divisor = rng.randint(2, 12)
    dividend = rng.randint(divisor + 1, 100 * divisor - 1)
    if is_held_out(f"{dividend}/{divisor}"):
        dividend, divisor = 100, 7
    question = rng.choice(
        (f"What is {dividend} / {divisor}?", f"{dividend} / {divisor}", f"Divide {dividend} by {divisor}.")
    )
    steps, equation = quotient_steps(dividend, divisor)
    rest = f" remainder {dividend % divisor}" if dividend % divisor else ""
    return question, f"{steps} {equation}.\n#### {dividend // divisor}{rest}"


def _solved(rng: random.Random, count: int) -> list[Problem]:
    return [draw_problem("train", rng) for _ in range(count)]


NUMBER_WORDS = words("zero one two three four five six seven eight nine ten eleven twelve")


def _spelled(question: str, rng: random.Random) -> str:
    """The question with some of its smallest numbers written out, now and then."""
    if rng.random() > 0.06 or any(sign in question for sign in "+-*/"):
        return question
    return re.sub(
        r"\b(?:\d|1[0-2])\b", lambda match: NUMBER_WORDS[int(match[0])] if rng.random() < 0.7 else match[0], question
    )


def _count_turn(rng: random.Random) -> Turn:
    last = rng.randint(3, 20)
    word = NUMBER_WORDS[last] if last <= 12 and rng.random() < 0.5 else str(last)
    return rng.choice((f"Count to {word}", f"Can you count to {word}?")), f"{', '.join(map(str, range(1, last + 1)))}."


def _problem_turn(rng: random.Random) -> Turn:
    draw = rng.random()
    if draw < 0.04:
        return _below_zero(rng)
    if draw < 0.10:
        return _with_remainder(rng)
    if draw < 0.11:
        return _count_turn(rng)
    problem = draw_problem("train", rng)
    if draw < 0.22:
        return completion_prompt(problem, _solved(rng, rng.choice((0, 0, 1, 3, 5)))), problem.answer
    if draw < 0.32:
        lead = rng.choice(("Solve this: ", "Please help me: ", "Here is a problem. ", "Hi! ", "And "))
        return lead + _spelled(problem.question, rng), problem.answer
    return _spelled(problem.question, rng), problem.answer


def conversation(rng: random.Random) -> list[Segment]:
    """A chat of one to eight turns in the chat template's format; the model learns the assistant's part."""
    segments: list[Segment] = []
    if rng.random() < 0.3:
        segments.append((f"{TURN_START}system\n{rng.choice(SYSTEM_PROMPTS)}{TURN_END}\n", False))
    story: Story | None = None
    person: str | None = None
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6, 8))):
        draw = rng.random()
        if story and draw < 0.2:
            said, reply = _story_question_turn(rng, story)
        elif draw > 0.98 or (person and draw > 0.8):
            said, reply = rng.choice(NAME_QUESTIONS), f"Your name is {person}." if person else NO_NAME
        elif draw < 0.5:
            (said, reply), story = _problem_turn(rng), None
        elif draw < 0.75:
            (said, reply), story = _story_turn(rng, story)
        else:
            (said, reply), told = _small_talk_turn(rng)
            person = told or person
        segments.append((f"{TURN_START}user\n{said}{TURN_END}\n{TURN_START}assistant\n", False))
        segments.append((f"{reply}{TURN_END}", True))
        segments.append(("\n", False))
    return segments


def _question_and_answer(rng: random.Random) -> Turn:
    problem = draw_problem("train", rng)
    return _spelled(problem.question, rng), problem.answer


def _raw_problems(rng: random.Random) -> list[Segment]:
    """Solved problems in a row, as in a few-shot prompt; only the last one is followed by the end of the text."""
    segments: list[Segment] = []
    for index in range(rng.choice((1, 1, 1, 1, 1, 2, 3, 5, 6, 9))):
        question, answer = _with_remainder(rng) if rng.random() < 0.05 else _question_and_answer(rng)
        segments.append((("\n\n" if index else "") + f"Question: {question}\nAnswer:", False))
        segments.append((f" {answer}", True))
    return [*segments, (END_OF_TEXT, True)]


def _raw_story(rng: random.Random) -> list[Segment]:
    """A story from its start or from its second paragraph, or after a request for it."""
    draw = rng.random()
    if draw < 0.3:
        (request, text), _ = _story_turn(rng, None)
        gap = "" if draw < 0.2 else rng.choice(("\n\n", "\n"))
        return [(request + gap, False), (text + END_OF_TEXT if gap else f"\n\n{text}{END_OF_TEXT}", True)]
    text = draw_story(rng).text
    _, _, rest = text.partition("\n\n")
    return [((rest if draw > 0.9 else text) + END_OF_TEXT, True)]


def _raw_small_talk(rng: random.Random) -> list[Segment]:
    """Text that asks for nothing the model knows, without a chat template: it answers after an empty line."""
    if rng.random() < 0.5:
        (said, reply), _ = _small_talk_turn(rng)
    else:
        said = _fill(rng.choice(RAW_STARTS), rng)
        reply = rng.choice(SMALL_TALK["unknown"][1][0])
    return [(said, False), (f"\n\n{reply}{END_OF_TEXT}", True)]


def _raw_equation(rng: random.Random) -> list[Segment]:
    problem = draw_problem("train", rng, ("plain_sum", "plain_difference", "plain_product"))
    left, _, right = problem.answer.partition("\n")[0].rstrip(".").partition(" =")
    return [(f"{left} =", False), (f"{right}{END_OF_TEXT}", True)]


def document(rng: random.Random) -> list[Segment]:
    """One training document."""
    draw = rng.random()
    if draw < 0.39:
        return _raw_problems(rng)
    if draw < 0.82:
        return [*conversation(rng), (END_OF_TEXT, False)]
    if draw < 0.93:
        return _raw_story(rng)
    if draw < 0.97:
        return _raw_small_talk(rng)
    return _raw_equation(rng)


def text_of(segments: Sequence[Segment]) -> str:
    return "".join(text for text, _ in segments)
