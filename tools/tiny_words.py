"""The words of the generated data, and words that do not exist.

A model that sees only known names learns to recognise them; to work with any name it has to copy it. So some of the
names and things are made up of English syllables.
"""

from __future__ import annotations

import random


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


GIRLS = words(
    "Mia Anna Lily Ella Zoe Ruth Nora Clara Ines Lucy Rosa Maya Jane Emma Olga Alice Sara Julia Kate Nina Eva Amy Tina "
    "Laura Sofia Hannah Leila Priya Yuki Grace"
)
BOYS = words(
    "Tom Ben Sam Max Leo Omar Paul Finn Hugo Ivan Jack Noah Carl Adam Luis Bob John Peter David Mark Tim Nick Felix "
    "Oscar Liam Ravi Chen Marco Daniel Alex"
)
ITEMS = words(
    "apples pears plums lemons oranges eggs cookies candies muffins sweets pencils stickers marbles stamps cards "
    "shells stones beads buttons balloons coins books crayons flowers nuts acorns tickets toys ribbons candles berries"
)
GOODS = words("pens cups caps kites hats balls books lamps plates bags scarves toys tickets cakes pies brushes shirts")
CONTAINERS = words("boxes bags baskets jars trays shelves crates packs")
GROUPS = words("friends children students neighbours cousins people")
VEHICLES = words("car train bus truck ship boat cyclist")
DAYS = (("Monday", "Tuesday", "Wednesday"), ("Thursday", "Friday", "Saturday"), ("Friday", "Saturday", "Sunday"))
SHOPS = words("bakery shop farm market kiosk store factory")
COLOURS = words("red blue green yellow white black brown pink")
ARTICLES = words("kite book lamp ball hat bike toy coat drum game guitar watch")
ONSETS = words(
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr v "
    "w y z b d g h j k l m n p r s t"
)
VOWELS = words("a e i o u a e i o u a e i o ai au ea ee ie oa oo ou y")
CODAS = words("b ck d ff g l ll m n ng nk nt p r rd rk rt s sk ss st t th tt x z n r s l")


def made_up_word(rng: random.Random) -> str:
    """A word of one to three syllables, most of which do not exist."""
    syllables = [
        rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
        for _ in range(rng.choice((1, 1, 2, 2, 2, 2, 3)))
    ]
    if rng.random() < 0.04:
        syllables.insert(1, "-")
    return "".join(syllables).strip("-")


def made_up_name(rng: random.Random) -> str:
    return "-".join(part.capitalize() for part in made_up_word(rng).split("-"))


def items(rng: random.Random) -> str:
    """Things one can count, in the plural."""
    return made_up_word(rng) + "s" if rng.random() < 0.1 else rng.choice(ITEMS)


def goods(rng: random.Random) -> str:
    """Things one can buy, in the plural."""
    return made_up_word(rng) + "s" if rng.random() < 0.1 else rng.choice(GOODS)
