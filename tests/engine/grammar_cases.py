"""Random grammars, and whether an answer satisfies one by another library than the engine's.

`python tests/engine/grammar_cases.py` has both built-in models answer 500 random JSON schemas and 200 random regular
expressions, greedily and at temperature 1, and prints what was wrong; the suite does it with a few.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

import miniserve
from miniserve.core import FinishReason, Grammar, SamplingParams
from miniserve.llm import LLM

MODELS = [Path(miniserve.__file__).parent / "assets" / name for name in ("tiny-qwen3", "tiny-deepseek")]


def schemas(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [_with_definitions(rng) for _ in range(count)]


def regexes(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [_regex(rng, 3) for _ in range(count)]


def grammar_of(case: dict[str, Any] | str) -> Grammar:
    return Grammar("regex", case) if isinstance(case, str) else Grammar("json_schema", json.dumps(case))


def fault(case: dict[str, Any] | str, text: str) -> str | None:
    """Why a finished answer is none, None if it is one."""
    if isinstance(case, str):
        return None if re.fullmatch(case, text, re.ASCII) else "no full match"
    try:
        jsonschema.Draft202012Validator(case).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def answer_all(llm: LLM, cases: list[Any], **params: Any) -> tuple[Counter[str], list[str]]:
    """How the answers ended, and what was wrong with them."""
    prompt = "Once upon a time"
    asked = [SamplingParams(grammar=grammar_of(case), **params) for case in cases]
    counts: Counter[str] = Counter()
    faults = []
    for case, generation in zip(cases, llm.generate([prompt] * len(cases), asked), strict=True):
        (output,) = generation.outputs
        counts[str(output.finish_reason)] += 1
        wrong = output.error
        if output.finish_reason is FinishReason.STOP:
            wrong = fault(case, output.text)
        if wrong is not None:
            faults.append(f"{case!r} was answered {output.text!r}: {wrong}")
    return counts, faults


def _with_definitions(rng: random.Random) -> dict[str, Any]:
    names = [f"d{i}" for i in range(rng.randint(0, 2))]
    schema = _schema(rng, 3, names)
    if names:
        schema = {"$defs": {name: _schema(rng, 1, []) for name in names}, **schema}
    return schema


def _schema(rng: random.Random, depth: int, names: list[str]) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _constant, _enum, lambda rng: {"type": rng.choice(["boolean", "null"])}]
    if names and rng.random() < 0.25:
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(kinds)(rng)
    match rng.choice(["object", "object", "array", "anyOf"]):
        case "object":
            keys = rng.sample(["a", "name", "größe", 'q"uote', "x y", "n1"], rng.randint(1, 4))
            return {
                "type": "object",
                "properties": {key: _schema(rng, depth - 1, names) for key in keys},
                "required": rng.sample(keys, rng.randint(0, len(keys))),
                "additionalProperties": rng.choice([False, False, {"type": "integer", "minimum": 0, "maximum": 9}]),
            }
        case "array":
            least = rng.randint(0, 2)
            array: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
            if rng.random() < 0.2:
                array["prefixItems"] = [_schema(rng, depth - 1, names) for _ in range(rng.randint(1, 2))]
            return {**array, "items": _schema(rng, depth - 1, names)}
        case _:
            return {"anyOf": [_schema(rng, depth - 1, names) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random) -> dict[str, Any]:
    match rng.randrange(4):
        case 0:
            return {"type": "string", "maxLength": rng.randint(0, 12)}
        case 1:
            least = rng.randint(0, 5)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
        case 2:
            return {"type": "string", "pattern": rng.choice([r"^[a-z]{2,5}$", r"^\d{3}-\d{2}$", r"^(yes|no)!?$"])}
        case _:
            return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4", "date-time"])}


def _integer(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-2000, 2000)
    bounds = rng.choice([{"minimum": low, "maximum": low + rng.randint(0, 500)}, {"exclusiveMinimum": low}, {}])
    return {"type": "integer", "maximum": 10**6, "minimum": -(10**6), **bounds}


def _number(rng: random.Random) -> dict[str, Any]:
    low = round(rng.uniform(-100, 100), 2)
    return {"type": "number", "minimum": low, "exclusiveMaximum": round(low + rng.uniform(0.5, 50), 3)}


def _constant(rng: random.Random) -> dict[str, Any]:
    return {"const": rng.choice(["x", 3, None, True, [1, "two"], {"k": 1.5}, "tab\t, ü and \u2028"])}


def _enum(rng: random.Random) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", 7, 7.5, None, False, "", [1], {"a": None}, "é"], rng.randint(1, 4))}


def _regex(rng: random.Random, depth: int) -> str:
    if depth == 0:
        literals = [
            "a",
            "b",
            "xy",
            r"\.",
            r"\d",
            r"\w",
            r"\s",
            "[a-f]",
            "[^abc]",
            r"[\d_]",
            ".",
            "é",
            r"\/",
            '"',
            r"\\",
        ]
        return rng.choice(literals)
    match rng.randrange(4):
        case 0:
            return "".join(_regex(rng, depth - 1) for _ in range(rng.randint(1, 4)))
        case 1:
            return f"({'|'.join(_regex(rng, depth - 1) for _ in range(rng.randint(1, 3)))})"
        case 2:
            least = rng.randint(0, 2)
            times = rng.choice(["?", f"{{{least},{least + rng.randint(0, 3)}}}", f"{{{least + 1}}}"])
            return f"(?:{_regex(rng, depth - 1)}){times}"
        case _:
            return _regex(rng, depth - 1)


def main(num_schemas: int = 500, num_regexes: int = 200) -> int:
    cases: list[Any] = [*schemas(1, num_schemas), *regexes(2, num_regexes)]
    failed = False
    for model in MODELS:
        llm = LLM(model, dtype="float32", max_num_seqs=128)
        for temperature in (0.0, 1.0):
            counts, faults = answer_all(llm, cases, temperature=temperature, seed=3, max_tokens=120)
            print(model.name, f"temperature {temperature}:", dict(counts), f"{len(faults)} wrong", flush=True)
            print(*faults[:20], sep="\n", flush=True)
            failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
