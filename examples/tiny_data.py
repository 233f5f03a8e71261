"""Word problems with worked answers: what the built-in model learns, and the held-out ones it is measured on.

Pure Python, no third-party import, so that an evaluation task can use it without torch:

    for problem in problems("test", seed=0, count=1000):
        prompt = completion_prompt(problem)     # "Question: …\\nAnswer:"
        expected = " " + problem.answer         # worked, the last line is "#### N"

The format is that of gsm8k: a short derivation and the result after `####`. The split is made by arithmetic, not by
draw: a hash of the problem's expression ("17+52", operands of a commutative operation sorted) says whether it is held
out, so no phrasing of a held-out expression is ever the question of a training problem, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

HELD_OUT_PERCENT = 10


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words(
    "Mia Anna Lily Ella Zoe Ruth Nora Clara Ines Lucy Rosa Maya Jane Emma Olga Alice Sara Julia Kate Nina Eva Amy Tina "
    "Laura Sofia Hannah Leila Priya Yuki Grace"
)
BOYS = _words(
    "Tom Ben Sam Max Leo Omar Paul Finn Hugo Ivan Jack Noah Carl Adam Luis Bob John Peter David Mark Tim Nick Felix "
    "Oscar Liam Ravi Chen Marco Daniel Alex"
)
SYLLABLES = _words("ba bel da dor en fi gra ha ik jo ka la lo mar mi na nel pa pi ra ri sa shi ta tor va wen yo za zu")
ITEMS = _words(
    "apples pears plums lemons oranges eggs cookies candies muffins sweets pencils stickers marbles stamps cards "
    "shells stones beads buttons balloons coins books crayons flowers nuts acorns tickets toys ribbons candles berries"
)
GOODS = _words("pens cups caps kites hats balls books lamps plates bags scarves toys tickets cakes pies brushes shirts")
CONTAINERS = _words("boxes bags baskets jars trays shelves crates packs")
GROUPS = _words("friends children students neighbours cousins people")
VEHICLES = _words("car train bus truck ship boat cyclist")
DAYS = (("Monday", "Tuesday", "Wednesday"), ("Thursday", "Friday", "Saturday"), ("Friday", "Saturday", "Sunday"))


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


@dataclass(frozen=True)
class _Draft:
    """What a template makes of its draw: the numbers, the split key, the two texts and the result."""

    numbers: tuple[int, ...]
    expression: str
    question: str
    working: str
    result: int


def _person(rng: random.Random) -> tuple[str, str, str]:
    """A name with "he" and "his", or "she" and "her"; some names are made up, so that any name is copied, not known."""
    if rng.random() < 0.15:
        name = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()
        return name, *rng.choice((("she", "her"), ("he", "his")))
    if rng.random() < 0.5:
        return rng.choice(GIRLS), "she", "her"
    return rng.choice(BOYS), "he", "his"


def _two_people(rng: random.Random) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    first = second = _person(rng)
    while second[0] == first[0]:
        second = _person(rng)
    return first, second


_Template = Callable[[random.Random], _Draft]


def is_held_out(expression: str) -> bool:
    """Whether problems that ask for this arithmetic belong to the test split."""
    digest = hashlib.sha256(expression.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def product_steps(a: int, b: int) -> str:
    """`a * b` worked out over the tens and ones of the larger factor: "7 * 24 = 7 * 20 + 7 * 4 = 140 + 28 = 168"."""
    tens, ones = divmod(max(a, b), 10)
    if not tens or not ones:
        return f"{a} * {b} = {a * b}"
    if b >= a:
        split, parts = f"{a} * {10 * tens} + {a} * {ones}", (a * 10 * tens, a * ones)
    else:
        split, parts = f"{10 * tens} * {b} + {ones} * {b}", (10 * tens * b, ones * b)
    return f"{a} * {b} = {split} = {parts[0]} + {parts[1]} = {a * b}"


def quotient_steps(dividend: int, divisor: int) -> str:
    """`dividend / divisor`, exact, over the quotient's tens and ones: "84 / 7 = 70 / 7 + 14 / 7 = 10 + 2 = 12"."""
    quotient = dividend // divisor
    tens, ones = divmod(quotient, 10)
    if not tens or not ones:
        return f"{dividend} / {divisor} = {quotient}"
    high = 10 * tens * divisor
    low = dividend - high
    return f"{dividend} / {divisor} = {high} / {divisor} + {low} / {divisor} = {10 * tens} + {ones} = {quotient}"


def _number(rng: random.Random, low: int, high: int) -> int:
    """A number whose count of digits is drawn first, so that short ones are not rare."""
    return rng.randint(low, min(high, 10 ** rng.randint(len(str(low)), len(str(high))) - 1))


def _sum_key(*terms: int) -> str:
    return "+".join(str(term) for term in sorted(terms))


def _product_key(a: int, b: int) -> str:
    return f"{min(a, b)}*{max(a, b)}"


def _plain_sum(rng: random.Random) -> _Draft:
    a, b = _number(rng, 0, 999), _number(rng, 0, 999)
    phrase = rng.choice(
        (
            f"What is {a} + {b}?",
            f"What is {a} plus {b}?",
            f"Calculate {a} + {b}.",
            f"How much is {a} + {b}?",
            f"Add {a} and {b}.",
            f"What is the sum of {a} and {b}?",
            f"{a} + {b} = ?",
            f"{a}+{b}",
            f"what's {a} + {b}",
            f"What is {a}+{b}?",
        )
    )
    return _Draft((a, b), _sum_key(a, b), phrase, f"{a} + {b} = {a + b}.", a + b)


def _plain_difference(rng: random.Random) -> _Draft:
    a, b = sorted((_number(rng, 0, 999), _number(rng, 0, 999)), reverse=True)
    phrase = rng.choice(
        (
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"Calculate {a} - {b}.",
            f"How much is {a} - {b}?",
            f"What is the difference of {a} and {b}?",
            f"{a} - {b} = ?",
            f"{a}-{b}",
            f"what's {a} - {b}",
            f"What is {a}-{b}?",
        )
    )
    return _Draft((a, b), f"{a}-{b}", phrase, f"{a} - {b} = {a - b}.", a - b)


def _plain_product(rng: random.Random) -> _Draft:
    a, b = rng.randint(2, 12), rng.randint(2, 99)
    if rng.random() < 0.4:
        a, b = b, a
    phrase = rng.choice(
        (
            f"What is {a} * {b}?",
            f"What is {a} times {b}?",
            f"Calculate {a} * {b}.",
            f"How much is {a} x {b}?",
            f"Multiply {a} by {b}.",
            f"What is the product of {a} and {b}?",
            f"{a} * {b} = ?",
            f"{a}*{b}",
            f"what's {a} x {b}",
            f"What is {a}x{b}?",
        )
    )
    return _Draft((a, b), _product_key(a, b), phrase, f"{product_steps(a, b)}.", a * b)


def _plain_quotient(rng: random.Random) -> _Draft:
    divisor = rng.randint(2, 10)
    dividend = divisor * rng.randint(2, 99)
    phrase = rng.choice(
        (
            f"What is {dividend} / {divisor}?",
            f"What is {dividend} divided by {divisor}?",
            f"Calculate {dividend} / {divisor}.",
            f"Divide {dividend} by {divisor}.",
            f"{dividend} / {divisor} = ?",
            f"{dividend}/{divisor}",
        )
    )
    steps = quotient_steps(dividend, divisor)
    return _Draft((dividend, divisor), f"{dividend}/{divisor}", phrase, f"{steps}.", dividend // divisor)


def _getting(rng: random.Random) -> _Draft:
    a, b = _number(rng, 2, 999), _number(rng, 2, 999)
    (name, he, _), (giver, _, _) = _two_people(rng)
    item = rng.choice(ITEMS)
    more = rng.choice(
        (
            f". {giver} gives {name} {b} more",
            f" and finds {b} more",
            f". {name} buys {b} more",
            f" and buys {b} more {item}",
            f". Then {he} gets {b} more from {giver}",
            f". {he.capitalize()} gets {b} more {item}",
        )
    )
    ask = rng.choice((f"{name} have now", f"{he} have now", f"{name} have in total", f"{he} have"))
    question = f"{name} has {a} {item}{more}. How many {item} does {ask}?"
    return _Draft((a, b), _sum_key(a, b), question, f"{name} has {a} + {b} = {a + b} {item}.", a + b)


def _giving(rng: random.Random) -> _Draft:
    a, b = sorted((_number(rng, 2, 999), _number(rng, 2, 999)), reverse=True)
    (name, he, his), (friend, _, _) = _two_people(rng)
    item = rng.choice(ITEMS)
    less = rng.choice(
        (
            f". {name} gives {b} of them to {friend}",
            f" and gives {b} {item} to {friend}",
            f". {he.capitalize()} loses {b} of them",
            f". {name} sells {b} of them",
            f" and loses {b}",
            f". {he.capitalize()} gives {b} to {his} friend {friend}",
        )
    )
    ask = rng.choice(
        (f"does {name} have left", f"are left for {name}", f"does {he} still have", f"does {he} have left")
    )
    question = f"{name} has {a} {item}{less}. How many {item} {ask}?"
    return _Draft((a, b), f"{a}-{b}", question, f"{name} has {a} - {b} = {a - b} {item} left.", a - b)


def _buying(rng: random.Random) -> _Draft:
    count, price = rng.randint(2, 12), rng.randint(2, 99)
    name, he, _ = _person(rng)
    goods = rng.choice(GOODS)
    question = rng.choice(
        (
            f"{name} buys {count} {goods}. Each costs {price} dollars. How many dollars does {he} pay?",
            f"{name} buys {count} {goods} for {price} dollars each. How much does {name} pay in dollars?",
            f"A shop sells {goods}. {name} takes {count} of them at {price} dollars each. "
            f"How many dollars does {name} spend?",
        )
    )
    working = f"{name} pays {product_steps(count, price)} dollars."
    return _Draft((count, price), _product_key(count, price), question, working, count * price)


def _sharing(rng: random.Random) -> _Draft:
    groups, each = rng.randint(2, 10), rng.randint(2, 99)
    total = groups * each
    name, _, _ = _person(rng)
    item, group = rng.choice(ITEMS), rng.choice(GROUPS)
    question = rng.choice(
        (
            f"{name} shares {total} {item} equally among {groups} {group}. How many {item} does each one get?",
            f"{name} has {total} {item} and gives the same number to each of {groups} {group}. "
            f"How many {item} does each one get?",
            f"{total} {item} are shared equally by {groups} {group}. How many {item} does each one get?",
        )
    )
    working = f"Each one gets {quotient_steps(total, groups)} {item}."
    return _Draft((total, groups), f"{total}/{groups}", question, working, each)


def _travelling(rng: random.Random) -> _Draft:
    speed, hours = rng.randint(5, 99), rng.randint(2, 12)
    vehicle = rng.choice(VEHICLES)
    question = rng.choice(
        (
            f"A {vehicle} travels at {speed} km per hour. How many km does it travel in {hours} hours?",
            f"A {vehicle} goes {speed} km every hour. How far does it go in {hours} hours, in km?",
            f"A {vehicle} moves at {speed} km per hour for {hours} hours. How many km is that?",
        )
    )
    working = f"The {vehicle} travels {product_steps(speed, hours)} km."
    return _Draft((speed, hours), _product_key(speed, hours), question, working, speed * hours)


def _getting_and_giving(rng: random.Random) -> _Draft:
    a, b = _number(rng, 5, 499), _number(rng, 5, 499)
    c = rng.randint(2, a + b - 1)
    (name, he, _), (friend, _, _) = _two_people(rng)
    item = rng.choice(ITEMS)
    more = rng.choice((f"{he.capitalize()} buys {b} more", f"{name} finds {b} more", f"{name} gets {b} more"))
    less = rng.choice((f"gives {c} to {friend}", f"sells {c} of them", f"gives away {c}"))
    question = f"{name} has {a} {item}. {more} and then {less}. How many {item} does {name} have now?"
    working = (
        f"After getting more, {name} has {a} + {b} = {a + b} {item}. "
        f"After that {name} has {a + b} - {c} = {a + b - c} {item}."
    )
    return _Draft((a, b, c), f"{_sum_key(a, b)}-{c}", question, working, a + b - c)


def _containers(rng: random.Random) -> _Draft:
    count, each, extra = rng.randint(2, 12), rng.randint(2, 60), rng.randint(2, 99)
    name, _, _ = _person(rng)
    item, container = rng.choice(ITEMS), rng.choice(CONTAINERS)
    question = rng.choice(
        (
            f"{name} has {count} {container} with {each} {item} each and {extra} more {item}. "
            f"How many {item} does {name} have in total?",
            f"There are {count} {container} with {each} {item} in each. {name} brings {extra} more {item}. "
            f"How many {item} are there now?",
        )
    )
    inside = count * each
    working = (
        f"The {container} hold {product_steps(count, each)} {item}. "
        f"In total there are {inside} + {extra} = {inside + extra} {item}."
    )
    key = f"{_product_key(count, each)}+{extra}"
    return _Draft((count, each, extra), key, question, working, inside + extra)


def _change(rng: random.Random) -> _Draft:
    count, price = rng.randint(2, 9), rng.randint(2, 60)
    cost = count * price
    purse = cost + _number(rng, 1, 199)
    name, he, _ = _person(rng)
    goods = rng.choice(GOODS)
    question = rng.choice(
        (
            f"{name} has {purse} dollars and buys {count} {goods} for {price} dollars each. "
            f"How many dollars does {he} have left?",
            f"{name} has {purse} dollars. {he.capitalize()} buys {count} {goods} at {price} dollars each. "
            f"How many dollars are left?",
        )
    )
    working = (
        f"The {goods} cost {product_steps(count, price)} dollars. "
        f"{name} has {purse} - {cost} = {purse - cost} dollars left."
    )
    key = f"{purse}-{_product_key(count, price)}"
    return _Draft((purse, count, price), key, question, working, purse - cost)


def _three_days(rng: random.Random) -> _Draft:
    a, b, c = (_number(rng, 2, 299) for _ in range(3))
    name, _, _ = _person(rng)
    first, second, third = rng.choice(DAYS)
    verb, noun = rng.choice((("reads", "pages"), ("picks", "berries"), ("sells", "tickets"), ("plants", "trees")))
    question = (
        f"{name} {verb} {a} {noun} on {first}, {b} on {second} and {c} on {third}. "
        f"How many {noun} is that in {rng.choice(('total', 'all'))}?"
    )
    working = (
        f"On the first two days it is {a} + {b} = {a + b} {noun}. In total it is {a + b} + {c} = {a + b + c} {noun}."
    )
    return _Draft((a, b, c), _sum_key(a, b, c), question, working, a + b + c)


def _comparing(rng: random.Random) -> _Draft:
    a, b = _number(rng, 2, 299), _number(rng, 2, 299)
    (name, _, _), (friend, _, _) = _two_people(rng)
    item = rng.choice(ITEMS)
    question = (
        f"{name} has {a} {item}. {friend} has {b} more {item} than {name}. "
        f"How many {item} do they have {rng.choice(('together', 'in total'))}?"
    )
    working = f"{friend} has {a} + {b} = {a + b} {item}. Together they have {a} + {a + b} = {2 * a + b} {item}."
    return _Draft((a, b), f"{a}+({a}+{b})", question, working, 2 * a + b)


def _multiple(rng: random.Random) -> _Draft:
    factor, a = rng.randint(2, 9), rng.randint(2, 99)
    (name, _, _), (friend, _, _) = _two_people(rng)
    item = rng.choice(ITEMS)
    question = (
        f"{friend} has {factor} times as many {item} as {name}. {name} has {a} {item}. "
        f"How many {item} do they have {rng.choice(('together', 'in total'))}?"
    )
    more = factor * a
    working = f"{friend} has {product_steps(factor, a)} {item}. Together they have {more} + {a} = {more + a} {item}."
    return _Draft((factor, a), f"{factor}*{a}+{a}", question, working, more + a)


def _remaining_way(rng: random.Random) -> _Draft:
    a, b = _number(rng, 5, 399), _number(rng, 5, 399)
    way = a + b + _number(rng, 1, 199)
    name, he, _ = _person(rng)
    how = rng.choice(("drives", "rides", "travels"))
    question = (
        f"{name} wants to go {way} km. {he.capitalize()} {how} {a} km in the morning and {b} km in the afternoon. "
        f"How many km are left?"
    )
    working = f"{name} {how} {a} + {b} = {a + b} km. Then {way} - {a + b} = {way - a - b} km are left."
    return _Draft((way, a, b), f"{way}-({_sum_key(a, b)})", question, working, way - a - b)


_TEMPLATES: dict[str, _Template] = {
    "plain_sum": _plain_sum,
    "plain_difference": _plain_difference,
    "plain_product": _plain_product,
    "plain_quotient": _plain_quotient,
    "getting": _getting,
    "giving": _giving,
    "buying": _buying,
    "sharing": _sharing,
    "travelling": _travelling,
    "getting_and_giving": _getting_and_giving,
    "containers": _containers,
    "change": _change,
    "three_days": _three_days,
    "comparing": _comparing,
    "multiple": _multiple,
    "remaining_way": _remaining_way,
}
TEMPLATES: tuple[str, ...] = tuple(_TEMPLATES)


def _distractors(result: int, numbers: Sequence[int], rng: random.Random) -> tuple[str, str, str]:
    """Three wrong results: slips of one or ten, swapped digits, one of the question's own numbers."""
    digits = str(result)
    near = [result + step for step in (1, -1, 2, -2, 10, -10, 100, -100)]
    slips = [int(digits[1::-1] + digits[2:]), int(digits[::-1]), sum(numbers), *numbers]
    rng.shuffle(near)
    rng.shuffle(slips)
    wrong = list(dict.fromkeys(n for n in (*near[:1], *slips[:2], *near[1:]) if n >= 0 and n != result))[:3]
    return str(wrong[0]), str(wrong[1]), str(wrong[2])


def draw_problem(split: Split, rng: random.Random, templates: Sequence[str] = TEMPLATES) -> Problem:
    """One problem of the split: templates are equally likely, numbers are redrawn until they fall into the split."""
    template = rng.choice(templates)
    draft = _TEMPLATES[template](rng)
    while is_held_out(draft.expression) != (split == "test"):
        draft = _TEMPLATES[template](rng)
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
    """`count` problems, the same for the same arguments; no question is given twice.

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
    """The digits after the first "####" of a model's output, or None where it gives no result."""
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
