"""The templates of the word problems: each draws its numbers and words and gives question, working and result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.tiny_words import (
    ARTICLES,
    BOYS,
    COLOURS,
    CONTAINERS,
    DAYS,
    GIRLS,
    GROUPS,
    SHOPS,
    VEHICLES,
    goods,
    items,
    made_up_name,
)


@dataclass(frozen=True)
class Draft:
    """What a template makes of its draw: the numbers, the split key, the two texts and the result."""

    numbers: tuple[int, ...]
    expression: str
    question: str
    working: str
    result: int


def _person(rng: random.Random) -> tuple[str, str, str]:
    """A name with "he" and "his", or "she" and "her"."""
    if rng.random() < 0.2:
        return made_up_name(rng), *rng.choice((("she", "her"), ("he", "his")))
    if rng.random() < 0.5:
        return rng.choice(GIRLS), "she", "her"
    return rng.choice(BOYS), "he", "his"


def _two_people(rng: random.Random) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    first = second = _person(rng)
    while second[0] == first[0]:
        second = _person(rng)
    return first, second


Template = Callable[[random.Random], Draft]


def product_steps(a: int, b: int) -> str:
    """`a * b` in two parts: "7 * 24 = 7 * 20 + 7 * 4 = 140 + 28 = 168".

    The larger factor is split at its first digit, the second one where both have two digits.
    """
    split_second = b >= a or min(a, b) > 12
    whole = b if split_second else a
    high = whole - whole % (100 if whole > 99 else 10)
    low = whole - high
    if not high or not low:
        return f"{a} * {b} = {a * b}"
    parts = ((a, high), (a, low)) if split_second else ((high, b), (low, b))
    products = " + ".join(f"{x} * {y}" for x, y in parts)
    return f"{a} * {b} = {products} = {parts[0][0] * parts[0][1]} + {parts[1][0] * parts[1][1]} = {a * b}"


def quotient_steps(dividend: int, divisor: int) -> tuple[str, str]:
    """Long division of a dividend below a hundred times the divisor: the steps and the resulting equation.

    84 / 7: "7 * 10 = 70, 84 - 70 = 14, 7 * 2 = 14." and "84 / 7 = 10 + 2 = 12". If there is a remainder, the steps end
    with it: "100 / 7 = 14 remainder 2".
    """
    quotient, rest = divmod(dividend, divisor)
    high = quotient - quotient % 10
    low = quotient - high
    steps: list[str] = []
    left = dividend
    for part in (high, low):
        if part:
            steps.append(f"{divisor} * {part} = {divisor * part}")
            if rest or (part == high and low):
                steps.append(f"{left} - {divisor * part} = {left - divisor * part}")
            left -= divisor * part
    equation = f"{dividend} / {divisor} = " + (f"{high} + {low} = {quotient}" if high and low else str(quotient))
    if rest:
        equation = f"{dividend} / {divisor} = {quotient} remainder {rest}"
    return ", ".join(steps) + ".", equation


def _number(rng: random.Random, low: int, high: int) -> int:
    """A number whose count of digits is drawn first, so that short ones are not rare."""
    return rng.randint(low, min(high, 10 ** rng.randint(len(str(low)), len(str(high))) - 1))


def _sum_key(*terms: int) -> str:
    return "+".join(str(term) for term in sorted(terms))


def _product_key(a: int, b: int) -> str:
    return f"{min(a, b)}*{max(a, b)}"


def _plain_sum(rng: random.Random) -> Draft:
    a, b = _number(rng, 0, 9999), _number(rng, 0, 9999)
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
            f"{a} + {b}",
            f"{a}+{b}=",
            f"{a} + {b} =",
            f"what's {a} + {b}",
            f"What is {a}+{b}?",
        )
    )
    return Draft((a, b), _sum_key(a, b), phrase, f"{a} + {b} = {a + b}.", a + b)


def _plain_difference(rng: random.Random) -> Draft:
    a, b = sorted((_number(rng, 0, 9999), _number(rng, 0, 9999)), reverse=True)
    phrase = rng.choice(
        (
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"Calculate {a} - {b}.",
            f"How much is {a} - {b}?",
            f"What is the difference of {a} and {b}?",
            f"{a} - {b} = ?",
            f"{a}-{b}",
            f"{a} - {b}",
            f"{a}-{b}=",
            f"{a} - {b} =",
            f"what's {a} - {b}",
            f"What is {a}-{b}?",
        )
    )
    return Draft((a, b), f"{a}-{b}", phrase, f"{a} - {b} = {a - b}.", a - b)


def _factors(rng: random.Random) -> tuple[int, int]:
    """A small and a two-digit factor, two two-digit factors, or a digit and three digits, in either order."""
    draw = rng.random()
    if draw < 0.4:
        a, b = rng.randint(2, 12), rng.randint(2, 99)
    elif draw < 0.8:
        a, b = rng.randint(13, 99), rng.randint(13, 99)
    else:
        a, b = rng.randint(2, 9), rng.randint(100, 999)
    return (a, b) if rng.random() < 0.6 else (b, a)


def _plain_product(rng: random.Random) -> Draft:
    a, b = _factors(rng)
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
            f"{a} * {b}",
            f"{a} x {b}",
            f"{a}*{b}=",
            f"what's {a} x {b}",
            f"What is {a}x{b}?",
        )
    )
    return Draft((a, b), _product_key(a, b), phrase, f"{product_steps(a, b)}.", a * b)


def _plain_quotient(rng: random.Random) -> Draft:
    divisor = rng.randint(2, 12)
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
    steps, equation = quotient_steps(dividend, divisor)
    working = f"{steps} {equation}."
    return Draft((dividend, divisor), f"{dividend}/{divisor}", phrase, working, dividend // divisor)


def _plain_chain(rng: random.Random) -> Draft:
    """Three numbers: multiplication first, or what stands in brackets."""
    form = rng.choice(("sum", "product", "brackets"))
    if form == "brackets":
        a, b, c = rng.randint(1, 49), rng.randint(1, 49), rng.randint(2, 9)
        asked, key, result = f"({a} + {b}) * {c}", f"({_sum_key(a, b)})*{c}", (a + b) * c
        numbers, working = (a, b, c), f"{a} + {b} = {a + b}. {product_steps(a + b, c)}."
    else:
        c = _number(rng, 2, 999)
        if form == "sum":
            a, b = _number(rng, 2, 999), _number(rng, 2, 999)
            middle, start, steps, key = a + b, f"{a} + {b}", f"{a} + {b} = {a + b}", _sum_key(a, b)
        else:
            a, b = rng.randint(2, 9), rng.randint(2, 99)
            middle, start, steps, key = a * b, f"{a} * {b}", product_steps(a, b), _product_key(a, b)
        order = rng.choice(("+", "-") if form == "sum" else ("+", "-", "reversed +", "reversed -"))
        if order == "-":
            c %= middle
        elif order == "reversed -":
            c += middle
        numbers, asked, last = (a, b, c), f"{start} {order} {c}", f"{middle} {order} {c}"
        if order.startswith("reversed"):
            numbers, asked, last = (c, a, b), f"{c} {order[-1]} {start}", f"{c} {order[-1]} {middle}"
        result = middle + c if order[-1] == "+" else abs(middle - c)
        key = {"-": f"{key}-{c}", "reversed -": f"{c}-{key}"}.get(order, f"{key}+{c}")
        if form == "sum" and order == "+":
            key = _sum_key(a, b, c)
        working = f"{steps}. {last} = {result}."
    phrase = rng.choice((f"What is {asked}?", f"Calculate {asked}.", asked, f"{asked} = ?", asked.replace(" ", "")))
    return Draft(numbers, key, phrase, working, result)


def _getting(rng: random.Random) -> Draft:
    a, b = _number(rng, 2, 9999), _number(rng, 2, 9999)
    (name, he, _), (giver, _, _) = _two_people(rng)
    item = items(rng)
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
    if rng.random() < 0.15:
        more = rng.choice((f"get {b} more", f"buy {b} more", f"find {b} more {item}", f"pick {b} more"))
        question = f"I have {a} {item} and {more}. How many {item} do I have{rng.choice(('', ' now', ' in total'))}?"
        return Draft((a, b), _sum_key(a, b), question, f"You have {a} + {b} = {a + b} {item}.", a + b)
    ask = rng.choice((f"{name} have now", f"{he} have now", f"{name} have in total", f"{he} have"))
    question = f"{name} has {a} {item}{more}. How many {item} does {ask}?"
    return Draft((a, b), _sum_key(a, b), question, f"{name} has {a} + {b} = {a + b} {item}.", a + b)


def _giving(rng: random.Random) -> Draft:
    a, b = sorted((_number(rng, 2, 9999), _number(rng, 2, 9999)), reverse=True)
    (name, he, his), (friend, _, _) = _two_people(rng)
    item = items(rng)
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
    if rng.random() < 0.15:
        less = rng.choice((f"eat {b}", f"lose {b}", f"give away {b}", f"give {b} to {friend}", f"sell {b} of them"))
        ask = rng.choice((f"How many {item} do I have left", "How many are left", "How many do I have left"))
        question = f"I have {a} {item} and {less}. {ask}?"
        return Draft((a, b), f"{a}-{b}", question, f"You have {a} - {b} = {a - b} {item} left.", a - b)
    ask = rng.choice(
        (f"does {name} have left", f"are left for {name}", f"does {he} still have", f"does {he} have left")
    )
    question = f"{name} has {a} {item}{less}. How many {item} {ask}?"
    return Draft((a, b), f"{a}-{b}", question, f"{name} has {a} - {b} = {a - b} {item} left.", a - b)


def _buying(rng: random.Random) -> Draft:
    count, price = rng.randint(2, 12), rng.randint(2, 99)
    name, he, _ = _person(rng)
    things = goods(rng)
    question = rng.choice(
        (
            f"{name} buys {count} {things}. Each costs {price} dollars. How many dollars does {he} pay?",
            f"{name} buys {count} {things} for {price} dollars each. How much does {name} pay in dollars?",
            f"A shop sells {things}. {name} takes {count} of them at {price} dollars each. "
            f"How many dollars does {name} spend?",
        )
    )
    working = f"{name} pays {product_steps(count, price)} dollars."
    return Draft((count, price), _product_key(count, price), question, working, count * price)


def _sharing(rng: random.Random) -> Draft:
    groups, each = rng.randint(2, 12), rng.randint(2, 99)
    total = groups * each
    name, _, _ = _person(rng)
    item, group = items(rng), rng.choice(GROUPS)
    question = rng.choice(
        (
            f"{name} shares {total} {item} equally among {groups} {group}. How many {item} does each one get?",
            f"{name} has {total} {item} and gives the same number to each of {groups} {group}. "
            f"How many {item} does each one get?",
            f"{total} {item} are shared equally by {groups} {group}. How many {item} does each one get?",
        )
    )
    steps, equation = quotient_steps(total, groups)
    working = f"{steps} Each one gets {equation} {item}."
    return Draft((total, groups), f"{total}/{groups}", question, working, each)


def _travelling(rng: random.Random) -> Draft:
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
    return Draft((speed, hours), _product_key(speed, hours), question, working, speed * hours)


def _getting_and_giving(rng: random.Random) -> Draft:
    a, b = _number(rng, 5, 999), _number(rng, 5, 999)
    c = rng.randint(2, a + b - 1)
    (name, he, _), (friend, _, _) = _two_people(rng)
    item = items(rng)
    more = rng.choice((f"{he.capitalize()} buys {b} more", f"{name} finds {b} more", f"{name} gets {b} more"))
    less = rng.choice((f"gives {c} to {friend}", f"sells {c} of them", f"gives away {c}"))
    question = f"{name} has {a} {item}. {more} and then {less}. How many {item} does {name} have now?"
    working = (
        f"After getting more, {name} has {a} + {b} = {a + b} {item}. "
        f"After that {name} has {a + b} - {c} = {a + b - c} {item}."
    )
    return Draft((a, b, c), f"{_sum_key(a, b)}-{c}", question, working, a + b - c)


def _containers(rng: random.Random) -> Draft:
    count, each, extra = rng.randint(2, 12), rng.randint(2, 60), _number(rng, 2, 999)
    name, _, _ = _person(rng)
    item, container = items(rng), rng.choice(CONTAINERS)
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
    return Draft((count, each, extra), key, question, working, inside + extra)


def _change(rng: random.Random) -> Draft:
    count, price = rng.randint(2, 9), rng.randint(2, 60)
    cost = count * price
    purse = cost + _number(rng, 1, 4999)
    name, he, _ = _person(rng)
    things = goods(rng)
    question = rng.choice(
        (
            f"{name} has {purse} dollars and buys {count} {things} for {price} dollars each. "
            f"How many dollars does {he} have left?",
            f"{name} has {purse} dollars. {he.capitalize()} buys {count} {things} at {price} dollars each. "
            f"How many dollars are left?",
        )
    )
    working = (
        f"The {things} cost {product_steps(count, price)} dollars. "
        f"{name} has {purse} - {cost} = {purse - cost} dollars left."
    )
    key = f"{purse}-{_product_key(count, price)}"
    return Draft((purse, count, price), key, question, working, purse - cost)


def _three_days(rng: random.Random) -> Draft:
    a, b, c = (_number(rng, 2, 999) for _ in range(3))
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
    return Draft((a, b, c), _sum_key(a, b, c), question, working, a + b + c)


def _comparing(rng: random.Random) -> Draft:
    a, b = _number(rng, 2, 999), _number(rng, 2, 999)
    (name, _, _), (friend, _, _) = _two_people(rng)
    item = items(rng)
    question = (
        f"{name} has {a} {item}. {friend} has {b} more {item} than {name}. "
        f"How many {item} do they have {rng.choice(('together', 'in total'))}?"
    )
    working = f"{friend} has {a} + {b} = {a + b} {item}. Together they have {a} + {a + b} = {2 * a + b} {item}."
    return Draft((a, b), f"{a}+({a}+{b})", question, working, 2 * a + b)


def _multiple(rng: random.Random) -> Draft:
    factor, a = rng.randint(2, 9), rng.randint(2, 99)
    (name, _, _), (friend, _, _) = _two_people(rng)
    item = items(rng)
    question = (
        f"{friend} has {factor} times as many {item} as {name}. {name} has {a} {item}. "
        f"How many {item} do they have {rng.choice(('together', 'in total'))}?"
    )
    more = factor * a
    working = f"{friend} has {product_steps(factor, a)} {item}. Together they have {more} + {a} = {more + a} {item}."
    return Draft((factor, a), f"{factor}*{a}+{a}", question, working, more + a)


def _remaining_way(rng: random.Random) -> Draft:
    a, b = _number(rng, 5, 999), _number(rng, 5, 999)
    way = a + b + _number(rng, 1, 999)
    name, he, _ = _person(rng)
    how = rng.choice(("drives", "rides", "travels"))
    question = (
        f"{name} wants to go {way} km. {he.capitalize()} {how} {a} km in the morning and {b} km in the afternoon. "
        f"How many km are left?"
    )
    working = f"{name} {how} {a} + {b} = {a + b} km. Then {way} - {a + b} = {way - a - b} km are left."
    return Draft((way, a, b), f"{way}-({_sum_key(a, b)})", question, working, way - a - b)


def _together(rng: random.Random) -> Draft:
    a, b = _number(rng, 2, 9999), _number(rng, 2, 9999)
    (name, _, _), (friend, _, _) = _two_people(rng)
    item, shop, equation = items(rng), rng.choice(SHOPS), f"{a} + {b} = {a + b}"
    one, other = rng.sample(COLOURS, 2)
    day, _, other_day = rng.choice(DAYS)
    question, working = rng.choice(
        (
            (
                f"A {shop} sells {a} {item} in the morning and {b} in the afternoon. "
                f"How many {item} does it sell in total?",
                f"The {shop} sells {equation} {item}.",
            ),
            (
                f"A {shop} sold {a} {item} on {day} and {b} {item} on {other_day}. How many {item} did it sell?",
                f"The {shop} sold {equation} {item}.",
            ),
            (
                f"There are {a} {one} and {b} {other} {item}. How many {item} are there in total?",
                f"There are {equation} {item}.",
            ),
            (
                f"There are {a} girls and {b} boys in a school. How many children are there in total?",
                f"There are {equation} children.",
            ),
            (
                f"{name} has {a} {item} and {friend} has {b} {item}. How many {item} do they have together?",
                f"Together they have {equation} {item}.",
            ),
        )
    )
    return Draft((a, b), _sum_key(a, b), question, working, a + b)


def _missing(rng: random.Random) -> Draft:
    low, high = sorted((_number(rng, 2, 9999), _number(rng, 2, 9999)))
    (name, he, _), (friend, _, _) = _two_people(rng)
    item, equation = items(rng), f"{high} - {low} = {high - low}"
    question, working = rng.choice(
        (
            (
                f"{name} has {low} dollars. A {rng.choice(ARTICLES)} costs {high} dollars. "
                f"How many more dollars does {he} need?",
                f"{name} needs {equation} more dollars.",
            ),
            (
                f"{name} has {low} {item} and wants to have {high}. How many more {item} does {name} need?",
                f"{name} needs {equation} more {item}.",
            ),
            (
                f"{name} has {low} {item} and {friend} has {high}. How many more {item} does {friend} have?",
                f"{friend} has {equation} more {item}.",
            ),
        )
    )
    return Draft((low, high), f"{high}-{low}", question, working, high - low)


DRAWS: dict[str, Template] = {
    "plain_sum": _plain_sum,
    "plain_difference": _plain_difference,
    "plain_product": _plain_product,
    "plain_quotient": _plain_quotient,
    "plain_chain": _plain_chain,
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
    "together": _together,
    "missing": _missing,
}
