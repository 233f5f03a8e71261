"""The generated word problems: reproducible, disjoint between the splits, and right by an independent calculation."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tools import tiny_chat, tiny_data

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "miniserve" / "assets" / "tiny-qwen3"
TEST = list(tiny_data.problems("test", seed=1, count=3000))
TRAIN = list(tiny_data.problems("train", seed=1, count=6000))

# What each template asks for, from the numbers of its question in reading order.
FORMULAS: dict[str, Callable[..., int | Fraction]] = {
    "plain_sum": lambda a, b: a + b,
    "plain_difference": lambda a, b: a - b,
    "plain_product": lambda a, b: a * b,
    "plain_quotient": Fraction,
    "getting": lambda a, b: a + b,
    "giving": lambda a, b: a - b,
    "buying": lambda a, b: a * b,
    "sharing": Fraction,
    "travelling": lambda a, b: a * b,
    "getting_and_giving": lambda a, b, c: a + b - c,
    "containers": lambda a, b, c: a * b + c,
    "change": lambda a, b, c: a - b * c,
    "three_days": lambda a, b, c: a + b + c,
    "comparing": lambda a, b: a + a + b,
    "multiple": lambda a, b: a * b + b,
    "remaining_way": lambda a, b, c: a - b - c,
    "together": lambda a, b: a + b,
    "missing": lambda a, b: b - a,
}


def value(expression: str) -> Fraction:
    """A chain of + - * / over whole numbers, with the usual precedence."""
    total = Fraction(0)
    for sign, term in re.findall(r"(^|[+-])([^+-]+)", expression.replace(" ", "")):
        first, *rest = re.findall(r"([*/]?)(\d+)", term)
        product = Fraction(first[1])
        for operator, number in rest:
            product = product * int(number) if operator == "*" else product / int(number)
        total += -product if sign == "-" else product
    return total


def equations(text: str) -> list[str]:
    return re.findall(r"\d+(?: [-+*/] \d+)*(?: = -?\d+(?: [-+*/] \d+)*)+(?!\d| remainder)", text)


def asked(p: tiny_data.Problem, numbers: list[int]) -> int | Fraction:
    """What the question asks for; a plain chain states it as an expression."""
    if p.template != "plain_chain":
        return FORMULAS[p.template](*numbers)
    (expression,) = re.findall(r"[\d(][-+*()\d ]+\d", p.question)
    return value(re.sub(r"\((.+)\)", lambda match: str(value(match[1])), expression))


@pytest.mark.parametrize("template", tiny_data.TEMPLATES)
def test_answers_are_right(template: str) -> None:
    found = [p for p in TEST + TRAIN if p.template == template]
    assert len(found) > 100
    for p in found:
        numbers = [int(n) for n in re.findall(r"\d+", p.question)]
        assert tuple(numbers) == p.numbers
        assert asked(p, numbers) == int(p.final) >= 0
        assert p.answer.endswith(f"\n#### {p.final}")
        assert tiny_data.final_answer(" " + p.answer) == p.final


def test_every_worked_step_holds() -> None:
    steps = 0
    for p in TEST + TRAIN:
        chains = equations(p.answer)
        assert chains
        for chain in chains:
            sides = [value(side) for side in chain.split(" = ")]
            assert len(set(sides)) == 1, p.answer
            steps += len(sides) - 1
        assert value(chains[-1].split(" = ")[-1]) == int(p.final)
    assert steps > len(TEST + TRAIN)


def arithmetic(p: tiny_data.Problem) -> tuple[str, tuple[int, ...]]:
    """Template family and numbers, blind to phrasing and to the order of operands that may be swapped."""
    families = {"giving": "plain_difference", "sharing": "plain_quotient"}
    families |= dict.fromkeys(("getting", "together"), "plain_sum")
    families |= dict.fromkeys(("buying", "travelling"), "plain_product")
    family = families.get(p.template, p.template)
    if family == "plain_chain":
        family += "".join(re.findall(r"[-+*]", p.question))
    commutes = family in ("plain_sum", "plain_product", "three_days", "plain_chain++")
    return family, tuple(sorted(p.numbers)) if commutes else p.numbers


def test_splits_are_disjoint() -> None:
    assert not {p.question for p in TEST} & {p.question for p in TRAIN}
    assert not {arithmetic(p) for p in TEST} & {arithmetic(p) for p in TRAIN}
    assert all(tiny_data.is_held_out(p.expression) for p in TEST)
    assert not any(tiny_data.is_held_out(p.expression) for p in TRAIN)


def test_operands_may_be_swapped_without_changing_the_split() -> None:
    by_arithmetic: dict[tuple[str, tuple[int, ...]], str] = {}
    for p in TEST + TRAIN:
        assert by_arithmetic.setdefault(arithmetic(p), p.expression) == p.expression


def test_a_stream_repeats_for_its_seed_and_never_repeats_a_question() -> None:
    assert TEST[:200] == list(tiny_data.problems("test", seed=1, count=200))
    assert TEST[:200] != list(tiny_data.problems("test", seed=2, count=200))
    assert len({p.question for p in TEST}) == len(TEST)
    only = list(tiny_data.problems("test", seed=1, count=20, templates=("change",)))
    assert {p.template for p in only} == {"change"}


def test_the_stream_does_not_depend_on_hash_randomisation() -> None:
    code = (
        "import sys; from tools.tiny_data import problems; "
        "print([p.question for p in problems('test', 5, 20)], 'torch' in sys.modules)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    expected = [p.question for p in tiny_data.problems("test", 5, 20)]
    assert outputs == {f"{expected} False\n"}


def test_distractors_are_three_other_numbers() -> None:
    for p in TEST:
        assert len({*p.distractors, p.final}) == 4
        assert all(d.isdigit() and not p.final.startswith(d) for d in p.distractors)
        context, options, right = tiny_data.multiple_choice(p)
        assert options[right] == f" {p.final}"
        assert context + options[right] == f"{tiny_data.completion_prompt(p)} {p.answer}"
        assert sorted(options) == sorted(f" {n}" for n in (p.final, *p.distractors))
    assert {tiny_data.multiple_choice(p)[2] for p in TEST} == {0, 1, 2, 3}


def test_prompts() -> None:
    shot, problem = TRAIN[0], TEST[0]
    zero = tiny_data.completion_prompt(problem)
    assert zero == f"Question: {problem.question}\nAnswer:"
    assert tiny_data.completion_prompt(problem, [shot]) == (
        f"Question: {shot.question}\nAnswer: {shot.answer}\n\n{zero}"
    )
    assert tiny_data.chat_messages(problem) == [{"role": "user", "content": problem.question}]


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("1 + 1 = 2.\n#### 2", "2"),
        ("#### 42\n\nQuestion: …", "42"),
        ("#### 7 #### 8", "7"),
        ("no result", None),
        ("####", None),
        ("#### many", None),
    ],
)
def test_final_answer(text: str, final: str | None) -> None:
    assert tiny_data.final_answer(text) == final


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        next(tiny_data.problems("dev", 0, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="juggling"):
        next(tiny_data.problems("test", 0, 1, templates=("juggling",)))


def test_training_documents_teach_only_true_equations_and_never_a_held_out_one() -> None:
    rng = random.Random(0)
    held_out = {p.question for p in tiny_data.problems("test", seed=3, count=3000)}
    checked = remainders = 0
    for _ in range(4000):
        # "Solve x + 20 = 9" is a question the model learns to decline, no equation.
        text = re.sub("Solve x.*", "", tiny_chat.text_of(tiny_chat.document(rng)))
        asked_for = re.findall(r"(?:<\|im_start\|>user\n(?:Question: )?|Question: )(.+)", text)
        assert not {question.removesuffix("<|im_end|>") for question in asked_for} & held_out
        for chain in equations(text):
            assert len({value(side) for side in chain.split(" = ")}) == 1, chain
            checked += 1
        for dividend, divisor, quotient, rest in re.findall(r"(\d+) / (\d+) = (\d+) remainder (\d+)", text):
            assert divmod(int(dividend), int(divisor)) == (int(quotient), int(rest))
            remainders += 1
    assert checked > 4000 and remainders > 50


def test_documents_repeat_for_their_seed_and_mark_what_is_learned() -> None:
    first, second = ([tiny_chat.document(random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == second
    for segments in first:
        learned = "".join(text for text, learn in segments if learn)
        assert learned and "<|im_start|>" not in learned and "Question:" not in learned
        assert learned.endswith((tiny_chat.TURN_END, tiny_chat.END_OF_TEXT))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_the_model_never_merges_digits(tokenizer: Tokenizer) -> None:
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d.|.\d", token)]
    for text in ("12345+6789", " 100/7=", "#### 42", "a1b2"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_gives_every_text_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for text in [*(tiny_chat.text_of(tiny_chat.document(rng)) for _ in range(50)), "naïve 你好 🦊\n\n\t x"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_prompt_is_a_prefix_of_what_was_trained(tokenizer: Tokenizer) -> None:
    for p in TEST[:300]:
        prompt, whole = tiny_data.completion_prompt(p), f"{tiny_data.completion_prompt(p)} {p.answer}"
        ids = tokenizer.encode(prompt).ids
        assert tokenizer.encode(whole).ids[: len(ids)] == ids


def test_the_model_directory_is_small_and_whole(tokenizer: Tokenizer) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert (MODEL / "model.safetensors").stat().st_size < 10_000_000
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    ends = [tokenizer.token_to_id(token) for token in (tiny_chat.TURN_END, tiny_chat.END_OF_TEXT)]
    assert generation["eos_token_id"] == ends


def test_the_model_card_states_the_measured_scores() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    scores = json.loads((MODEL / "scores.json").read_text())["evaluation"]["exact_match"]
    for form, label in (("completion", "`Question: …\\nAnswer:`"), ("chat", "chat"), ("five_shot", "five solved")):
        cells = [f"{scores[dtype][form]['all']:.4f}" for dtype in ("bfloat16", "float32")]
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {label}")]
        assert [cell.strip() for cell in row.split("|")[2:4]] == cells
        assert min(float(cell) for cell in cells) >= 0.97
