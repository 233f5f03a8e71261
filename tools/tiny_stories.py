"""A grammar of short children's stories: heroes, places and twelve plots, each plot a row of beats with variants.

`draw_story(rng)` draws a hero, a friend, a place and a plot, and renders one variant of every beat. The choices are
kept beside the text, so that a request for just this story ("Tell me a story about a fox named Ruby") can be made.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from tools.tiny_words import BOYS, GIRLS, made_up_name, made_up_word, words


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


KINDS = words(
    "fox rabbit mouse bear owl cat dog puppy kitten hedgehog squirrel frog turtle duck duckling badger deer wolf "
    "lion tiger elephant monkey giraffe zebra penguin seal whale dolphin otter beaver mole bat crow sparrow eagle "
    "goose swan hen chicken cow sheep lamb goat horse pony donkey pig piglet camel kangaroo koala panda raccoon "
    "snail bee butterfly ladybug ant spider crab octopus fish starfish lizard dinosaur dragon unicorn fairy elf "
    "giant witch wizard princess prince knight pirate king queen farmer baker sailor gardener painter robot "
    "snowman ghost monster troll teddy doll train boat cloud star toad parrot hamster parakeet walrus moose lynx "
    "sloth astronaut teacher girl boy"
)
UNUSUAL_KINDS = words(
    "teapot spoon chair lamp cactus tomato potato banana carrot shoe sock pencil mountain river tree leaf flower "
    "mushroom computer phone car truck plane rocket bicycle ninja superhero vampire mermaid detective doctor "
    "nurse soldier chef baby grandmother grandfather uncle wind raindrop snowflake moon sun comet alien zombie "
    "mummy dwarf goblin phoenix griffin narwhal jellyfish lobster shrimp shark salmon goldfish worm caterpillar "
    "beetle cricket grasshopper dragonfly moth wasp peacock flamingo ostrich pelican pigeon seagull stork turkey "
    "rooster pheasant hawk falcon vulture leopard cheetah panther jaguar hyena jackal coyote rhino hippo gorilla "
    "chimpanzee lemur platypus armadillo anteater skunk weasel ferret gerbil chipmunk porcupine bison buffalo yak "
    "llama alpaca antelope gazelle crocodile alligator iguana gecko chameleon salamander newt book clock kettle "
    "violin piano guitar trumpet bus ship submarine tractor cake cookie cupcake pizza sandwich pumpkin pear apple "
    "lemon cheese button key door house castle bridge cowboy thief "
    "brother sister mother father aunt man woman postman policeman firefighter scientist singer monk clown ogre"
)
MALE_KINDS = frozenset(words("boy king prince wizard grandfather uncle rooster brother father man"))
FEMALE_KINDS = frozenset(words("girl queen princess witch hen cow grandmother mermaid sister mother aunt woman"))
HER_NAMES = words(
    "Ruby Hazel Luna Coco Daisy Poppy Willow Ivy Pearl Bella Honey Maple Nutmeg Clover Penny Dot Misty Tilly Fern Juno"
)
HIS_NAMES = words(
    "Pip Otto Milo Bramble Rusty Toby Bruno Otis Basil Ziggy Fred Gus Jasper Barnaby Teddy Monty Chip Rocky Theo"
)
ADJECTIVES = words(
    "little small young curious cheerful shy gentle clever quiet kind playful brave sleepy tiny busy friendly merry"
)
HELPER_ADJECTIVES = words("old wise kind friendly gentle tall patient cheerful small clever quiet")

CONTRADICTIONS = frozenset({("courage", "brave"), ("friendship", "friendly"), ("friendship", "merry")})

# (where, preposition, the place, three spots there).
PLACES: tuple[tuple[str, str, str, tuple[str, str, str]], ...] = (
    ("in a quiet forest", "in", "the forest", ("under the old oak", "beside the stream", "behind the ferns")),
    (
        "in a little house by the sea",
        "at",
        "the beach",
        ("behind the dunes", "between the rocks", "under the old boat"),
    ),
    ("high up in the mountains", "on", "the mountain", ("behind the waterfall", "in the cave", "on the stony path")),
    ("in a small village", "in", "the village", ("behind the bakery", "near the well", "under the wooden bridge")),
    ("on a sunny farm", "on", "the farm", ("in the barn", "behind the haystack", "under the apple tree")),
    (
        "in a wide green meadow",
        "in",
        "the meadow",
        ("in the tall grass", "under the blackberry bush", "beside the pond"),
    ),
    ("beside a blue lake", "at", "the lake", ("among the reeds", "under the willow", "on the little pier")),
    ("in a garden full of flowers", "in", "the garden", ("under the roses", "behind the shed", "next to the fountain")),
    ("in a big noisy city", "in", "the city", ("in the park", "behind the library", "at the bus stop")),
    ("in an old castle", "in", "the castle", ("in the tower", "under the long table", "behind the red curtain")),
    ("on a small island", "on", "the island", ("under the palm tree", "near the lighthouse", "in the hollow log")),
    ("in a snowy valley", "in", "the valley", ("behind the snowy pines", "by the frozen river", "under the sledge")),
    (
        "at the edge of the desert",
        "in",
        "the desert",
        ("behind the tall cactus", "beside the spring", "under a flat rock"),
    ),
    ("on the moon", "on", "the moon", ("behind the silver rocks", "in the deep crater", "next to the little rocket")),
    ("in a warm jungle", "in", "the jungle", ("under the big leaves", "beside the river", "among the vines")),
)
THINGS = _phrases(
    "red hat, blue scarf, golden key, silver bell, little drum, wooden boat, favourite book, shiny button, "
    "warm blanket, green umbrella, old lantern, music box, yellow kite, striped ball, tiny flute, glass marble"
)
FOODS = _phrases(
    "apple cake, warm bread, blueberry pie, honey cookies, pumpkin soup, gingerbread, strawberry jam, pancakes"
)
FRAGILE = ("glass bell", "music box", "blue vase", "china cup", "snow globe", "little clock", "glass bird", "clay jug")
# (what is wrong with the friend, what the hero does about it).
TROUBLES = (
    ("was shivering with cold", "wrapped {friend} in {his} own coat and gave {fhim} half of the {food}"),
    ("had a hurt foot", "put a bandage around the foot and let {friend} lean on {him}"),
    ("was stuck in the mud", "pulled and pulled until {friend} was free"),
    ("was very hungry", "sat down and shared all the {food} with {friend}"),
    ("had lost the way", "took {friend} by the hand and looked for the right path"),
)
# (what happens to the hero later, how the friend comes to help).
RESCUES = (
    (
        "a great storm came, and {name} could not find the way home",
        "Suddenly someone took {his} hand in the dark. It was {friend}!",
    ),
    ("{name} slipped and fell into the cold water", "Who jumped in and pulled {him} out? It was {friend}!"),
    ("winter came, and {name} had nothing left to eat", "There was a knock, and {friend} came in with a big basket."),
    ("{name} was ill and lay alone in bed", "The door opened, and in came {friend} with hot soup and flowers."),
)
# (to learn, learning, what goes wrong, what works in the end).
SKILLS: tuple[tuple[str, str, str, str], ...] = (
    ("swim", "swimming", "swallowed a lot of water", "swam all the way across the pond"),
    ("sing", "singing", "only made a croaky sound", "sang a song so sweet that the birds fell silent"),
    ("dance", "dancing", "tripped over a root", "danced round and round without a single slip"),
    ("paint", "painting", "spilled the paint everywhere", "painted a bright picture of the sunrise"),
    ("bake bread", "baking", "burned the bread until it was black", "took a golden loaf out of the oven"),
    ("fly a kite", "flying a kite", "got tangled up in the string", "made the kite fly higher than the trees"),
    ("ride a bicycle", "riding", "fell into a bush", "rode down the whole hill, laughing"),
    ("play the drum", "playing the drum", "dropped both sticks", "played a rhythm that made everyone clap"),
    ("juggle", "juggling", "dropped every ball", "kept four balls in the air at once"),
    ("whistle", "whistling", "only blew air", "whistled a tune that echoed from the hills"),
    ("read", "reading", "mixed up all the letters", "read a whole book aloud"),
    ("skate", "skating", "sat down hard on the ice", "glided over the ice like a feather"),
    ("fly", "flying", "fell flat on the ground", "flew high over the roofs like a bird"),
    ("row a boat", "rowing", "went round in circles", "rowed straight to the other side"),
)

OPENINGS = (
    "Once upon a time, there was {a_hero} named {name} who lived {where}.",
    "Once upon a time, {a_hero} named {name} lived {where}.",
    "There once was {a_hero} called {name}. {He} lived {where}.",
    "{A_hero} named {name} lived {where}.",
    "The {adjective} {kind} {name} lived {where}.",
    "Long ago, {a_hero} called {name} lived {where}.",
    "Not so long ago, there was {a_hero} named {name}, who lived {where}.",
)
TRAITS = (
    "{He} loved to watch the clouds in the morning.",
    "Every morning {he} said hello to the sun.",
    "{He} liked {food} more than anything else.",
    "{He} had a big heart and many questions.",
    "{He} knew every corner of {place}.",
    "Everyone {in_place} knew {his} happy laugh.",
    "{He} liked to hum a little tune all day long.",
    "",
    "",
)
ENDINGS = (
    "That night {name} fell asleep with a smile.",
    "And if you visit {place}, you may still hear {him} laugh.",
    "{name} never forgot that day.",
    "From then on, {name} and {friend} were always together.",
    "And they lived happily ever after.",
    "{He} went home tired and very happy.",
    "The stars came out, and all was well {in_place}.",
    "The end.",
    "",
)


def load_sections(path: Path) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Sections of "[name] variant | variant" followed by lines of variants: name -> (heading's variants, lines).

    The plots: themes a reader may ask for, then beats, of which an empty variant leaves the beat out.
    """
    sections: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}
    lines: list[tuple[str, ...]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)\] (.*)", line):
            lines = []
            sections[heading[1]] = (tuple(heading[2].split(" | ")), lines)
        else:
            lines.append(tuple(variant.strip() for variant in line.split(" |")))
    return sections


PLOTS = load_sections(Path(__file__).with_name("tiny_plots.txt"))


@dataclass(frozen=True)
class Story:
    """A story and the choices it was made from; `asks` are themes a reader might have asked for to get it."""

    text: str
    adjective: str
    kind: str
    name: str
    friend_kind: str
    friend: str
    his: str
    in_place: str
    plot: str
    asks: tuple[str, ...]


def with_article(noun: str) -> str:
    """ "a fox", "an owl", "a unicorn"."""
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def _character(
    rng: random.Random, taken: str = "", kind: str | None = None, invent: bool = False
) -> tuple[str, str, str]:
    """Kind, name and "he" or "she"; a name that is not used yet."""
    kind = kind or rng.choice(KINDS)
    pronoun = "she" if kind in FEMALE_KINDS else "he" if kind in MALE_KINDS else rng.choice(("he", "she"))
    name = taken
    while name == taken:
        if invent:
            name = made_up_name(rng)
        else:
            pets, people = (HER_NAMES, GIRLS) if pronoun == "she" else (HIS_NAMES, BOYS)
            name = rng.choice(people if kind in ("girl", "boy") or rng.random() < 0.3 else pets)
    return kind, name, pronoun


def _pronouns(he: str, prefix: str) -> dict[str, str]:
    him, his = ("him", "his") if he == "he" else ("her", "her")
    lower = {f"{prefix}he": he, f"{prefix}him": him, f"{prefix}his": his}
    upper = {f"{prefix.upper()}H{key[len(prefix) + 1 :]}": value.capitalize() for key, value in lower.items()}
    return lower | upper


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _slots(
    rng: random.Random, adjective: str, hero: tuple[str, str, str], friend: tuple[str, str, str]
) -> dict[str, str]:
    """One value for every {slot} of the beats; the same value throughout one story keeps it coherent."""
    where, preposition, place, spots = rng.choice(PLACES)
    spot1, spot2, spot3 = rng.sample(spots, 3)
    skill, skilling, fail, success = rng.choice(SKILLS)
    trouble, remedy = rng.choice(TROUBLES)
    later, rescue = rng.choice(RESCUES)
    thing, fragile = rng.choice(THINGS), rng.choice(FRAGILE)
    a_hero = with_article(f"{adjective} {hero[0]}")
    a_friend = with_article(f"{rng.choice(HELPER_ADJECTIVES)} {friend[0]}")
    slots = {
        "name": hero[1],
        "kind": hero[0],
        "adjective": adjective,
        "a_hero": a_hero,
        "A_hero": _capitalised(a_hero),
        "friend": friend[1],
        "fkind": friend[0],
        "a_friend": a_friend,
        "A_friend": _capitalised(a_friend),
        "where": where,
        "place": place,
        "in_place": f"{preposition} {place}",
        "spot1": spot1,
        "spot2": spot2,
        "spot3": spot3,
        "spot1_cap": _capitalised(spot1),
        "thing": thing,
        "a_thing": with_article(thing),
        "A_thing": _capitalised(with_article(thing)),
        "fragile": fragile,
        "a_fragile": with_article(fragile),
        "food": rng.choice(FOODS),
        "skill": skill,
        "skilling": skilling,
        "skilling_cap": _capitalised(skilling),
        "fail": fail,
        "success": success,
        "trouble": trouble,
        **_pronouns(hero[2], ""),
        **_pronouns(friend[2], "f"),
    }
    nested = {"remedy": remedy, "rescue": rescue, "later": later}
    return slots | {key: text.format(**slots) for key, text in nested.items()}


def draw_story(rng: random.Random, *, unusual: bool = False) -> Story:
    """One story of 100 to 250 words; every choice comes from `rng`.

    `unusual` takes a hero or names out of the ordinary, sometimes words that do not exist: a request for a story about
    a teapot, or about Zorblax the zabel, should get one.
    """
    kind, invent = None, unusual and rng.random() < 0.6
    if unusual and rng.random() < 0.7:
        kind = made_up_word(rng) if rng.random() < 0.4 else rng.choice(UNUSUAL_KINDS)
    hero = _character(rng, kind=kind, invent=invent)
    same = kind is None and rng.random() < 0.06
    friend_kind = hero[0] if same else next(k for k in rng.sample(KINDS, 2) if k != hero[0])
    friend = _character(rng, taken=hero[1], kind=friend_kind, invent=invent and rng.random() < 0.5)
    plot = rng.choice(tuple(PLOTS))
    adjective = rng.choice([word for word in ADJECTIVES if (plot, word) not in CONTRADICTIONS])
    asks, beats = PLOTS[plot]
    slots = _slots(rng, adjective, hero, friend)
    traits = TRAITS[:4] if plot == "friendship" else TRAITS
    chosen = [rng.choice(variants) for variants in (OPENINGS, traits, *beats, ENDINGS)]
    sentences = [sentence.format(**slots) for sentence in chosen if sentence]
    first = rng.randint(2, 4)
    middle = rng.randint(first + 2, len(sentences) - 3)
    paragraphs = (sentences[:first], sentences[first:middle], sentences[middle:])
    return Story(
        text="\n\n".join(" ".join(part) for part in paragraphs),
        adjective=adjective,
        kind=hero[0],
        name=hero[1],
        friend_kind=friend[0],
        friend=friend[1],
        his="his" if hero[2] == "he" else "her",
        in_place=slots["in_place"],
        plot=plot,
        asks=tuple(ask.format(**slots) for ask in asks),
    )
