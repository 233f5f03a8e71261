"""Time decode steps with grammars beside the same steps without: `python -m benchmarks.masked --model DIR`.

All rows of a step have a grammar that never ends, or none. The two take turns; a turn's step is the median over steps
of all rows, as the host sees tokens arrive. DIR needs a config.json only: without weights these are random, and without
a tokenizer there is one of made-up words, syllables, signs and bytes, whose masks take about the time of a real one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from miniserve.bench.report import header, write_json
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Grammar, Request, SamplingParams, Step, TokenMasks
from miniserve.engine.build import build_engine
from miniserve.engine.grammar import Matchers
from miniserve.engine.loop import EngineLoop
from miniserve.models.hub import locate

GRAMMARS = {
    "letters": Grammar("regex", "[a-z ]*"),
    # As what a model is asked for by a JSON schema, but without an end.
    "records": Grammar(
        "grammar",
        "%llguidance {}\n"
        'start: (%json {"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"], '
        '"properties": {"name": {"type": "string"}, "age": {"type": "integer"}, '
        '"tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}}}} "\\n")*\n',
    ),
}
_SYLLABLES = [
    a + b + c for a in ("", *"bcdfghlmnprst", "st", "tr", "qu", "sh") for b in "aeiou" for c in ("", *"nrstl")
]
_SETTLED = 3  # steps of all rows before the first that counts


@contextmanager
def watch(seconds: dict[str, list[float]], *methods: tuple[Any, str]) -> Iterator[None]:
    """Within this block note what each call of these methods, (object, name), takes."""

    def watched(name: str, method: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        found = method(*args)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return found

    with ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(mock.patch.object(owner, name, partial(watched, name, getattr(owner, name))))
        yield


def make_tokenizer(vocab_size: int) -> Any:
    """Byte-level, of so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rng, alphabet = random.Random(0), sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet)
    while len(tokens) < vocab_size:
        kind = rng.random()
        if kind < 0.92:
            word = "".join(rng.choices(_SYLLABLES, k=rng.choice([1, 2, 2, 3, 3, 3, 4])))
            word = word.capitalize() if kind < 0.1 else word
        else:
            word = "".join(rng.choices(alphabet, k=rng.randint(2, 5)))
        tokens[("Ġ" if rng.random() < 0.45 else "") + word] = None
    tokenizer = Tokenizer(models.BPE(vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def complete(model: Path, folder: Path) -> Path:
    """A directory with all that is needed: the model's, or `folder` with a tokenizer."""
    if any(model.glob("tokenizer*")):
        return model
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def watch_device(seconds: dict[str, list[float]], runner: Any) -> Iterator[None]:
    """Within this block note, of masked steps of graphs, how long the device computes before the draw, waits for the
    masks, and draws with them."""
    launch, collect, graphs = runner.launch, runner.collect, runner._graphs
    marks: dict[int, list[torch.cuda.Event]] = {}  # by step: the forward pass has ended; the masks have come
    latest: list[torch.cuda.Event] = []

    def mark() -> None:
        latest.append(torch.cuda.Event(enable_timing=True))
        latest[-1].record()

    def launch_marked(step: Step) -> None:
        nonlocal latest
        launch(step)
        if step.plan.masked and not step.plan.chunks:
            latest = marks[id(step)] = []
            mark()

    def take(masks: TokenMasks, batch: int) -> None:
        room.take(masks, batch)
        mark()

    def collect_marked(step: Step) -> None:
        events = step.on_device.events
        collect(step)
        if len(own := marks.pop(id(step), [])) == 2:
            parts = itertools.pairwise([events.start, *own, events.end])
            for part, (before, after) in zip(("forward", "late", "draw"), parts, strict=True):
                seconds.setdefault(part, []).append(before.elapsed_time(after) / 1000)

    room = graphs._masks
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(graphs, "_masks", SimpleNamespace(masks=room.masks, take=take)))
        stack.enter_context(mock.patch.object(runner, "launch", launch_marked))
        stack.enter_context(mock.patch.object(runner, "collect", collect_marked))
        yield


def time_steps(
    engine: EngineLoop, info: EngineInfo, batch: int, params: list[SamplingParams], prompt_len: int
) -> tuple[float, float]:
    """Median seconds of the steps in which each of `batch` requests gets a token, and what a tenth of them stay
    below."""
    rng = random.Random(1)
    for index in range(batch):
        prompt = [rng.randrange(info.vocab_size) for _ in range(prompt_len)]
        engine.add(Request(request_id=f"{index}", prompt_token_ids=prompt, params=params[index]))
    times = []
    while engine.has_work:
        outputs = engine.step()
        if sum(len(output.new_token_ids) for output in outputs) == batch:
            times.append(time.perf_counter())
        if wrong := [output.error for output in outputs if output.error is not None]:
            raise RuntimeError(wrong[0])
    steps = [later - earlier for earlier, later in itertools.pairwise(times)][_SETTLED:]
    return statistics.median(steps), statistics.quantiles(steps, n=10)[0]


def profile(
    engine: EngineLoop, info: EngineInfo, batch: int, params: list[SamplingParams], prompt_len: int
) -> dict[str, float]:
    """Median seconds of a step's parts: of the host, where launch holds masks and sample, and sample the masks' copy,
    the replay and what follows; and of the device, where `late` is how long it waits for masks."""
    seconds: dict[str, list[float]] = {}
    runner: Any = engine._runner
    watched = [(_matchers(engine), "masks"), (runner, "sample")]
    with ExitStack() as stack:
        if info.device != "cpu" and runner._graphs is not None:
            stack.enter_context(watch_device(seconds, runner))
            watched += [(runner._graphs._masks, "take"), (runner._graphs, "masked")]
        stack.enter_context(watch(seconds, *watched))
        time_steps(engine, info, batch, params, prompt_len)
    records = engine.log.records((params[0].max_tokens or 1) - 1)
    for part in ("schedule", "launch", "wait", "update", "device", "idle"):
        seconds[part] = [getattr(record, part) or 0.0 for record in records]
    return {part: statistics.median(each) for part, each in seconds.items()}


def measure(
    engine: EngineLoop, info: EngineInfo, args: argparse.Namespace, name: str, temperature: float
) -> dict[str, Any]:
    """Prints and returns what a grammar costs."""
    drawn: dict[str, Any] = {"temperature": temperature, "max_tokens": args.output_len, "ignore_eos": True}
    grammars = {"plain": None, "masked": GRAMMARS[name]}
    params = {
        kind: [SamplingParams(seed=row, grammar=grammar, **drawn) for row in range(args.batch)]
        for kind, grammar in grammars.items()
    }
    turns: dict[str, list[tuple[float, float]]] = {kind: [] for kind in params}
    for turn in range(-1, args.turns):  # one to warm up
        for kind, asked in params.items():
            found = time_steps(engine, info, args.batch, asked, args.input_len)
            if turn >= 0:
                turns[kind].append(found)
    parts = {kind: profile(engine, info, args.batch, asked, args.input_len) for kind, asked in params.items()}
    step = {kind: statistics.median(median for median, _ in each) for kind, each in turns.items()}
    quick = {kind: min(least for _, least in each) for kind, each in turns.items()}
    ratios = {"ratio": step["masked"] / step["plain"], "undisturbed_ratio": quick["masked"] / quick["plain"]}
    print(
        f"{name}, temperature {temperature:g}: {1e3 * step['plain']:.3f} ms a step, masked {1e3 * step['masked']:.3f}, "
        f"{ratios['ratio']:.3f} x; undisturbed {1e3 * quick['plain']:.3f}, {1e3 * quick['masked']:.3f}, "
        f"{ratios['undisturbed_ratio']:.3f} x"
    )
    for kind, each in parts.items():
        text = ", ".join(f"{part} {1e6 * seconds:.0f}" for part, seconds in each.items())
        print(f"  {kind:6} parts, us: {text}", flush=True)
    return {"grammar": name, "temperature": temperature, "turns_s": turns, **ratios, "parts_s": parts}


def _matchers(engine: EngineLoop) -> Matchers:
    assert engine._matchers is not None
    return engine._matchers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory with a config.json (default: the built-in model)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=129)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--grammars", default="letters,records", help=f"of {', '.join(GRAMMARS)}")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = None if args.model is None else complete(args.model, Path(folder))
        has_weights = model is None or any(model.glob("*.safetensors"))
        config = EngineConfig(
            model=None if model is None else str(model),
            device=args.device,
            load_format="auto" if has_weights else "dummy",
            max_num_seqs=args.batch,
            max_model_len=args.input_len + args.output_len,
            enable_prefix_caching=False,
            enforce_eager=args.enforce_eager,
        )
        source = locate(config.model, None, weights=has_weights)
        engine, info = build_engine(config, source.path, source.name)
        for grammar in GRAMMARS.values():  # loads the tokenizer where that is not done yet
            _matchers(engine).start(SamplingParams(grammar=grammar)).result()
    name = "the built-in model" if args.model is None else args.model.name
    print(f"{name} on {info.device}, {args.batch} rows, {info.vocab_size} words", flush=True)
    cases = itertools.product(args.grammars.split(","), map(float, args.temperatures.split(",")))
    rows = [measure(engine, info, args, name, temperature) for name, temperature in cases]
    if args.json:
        settings = {"model": name, "device": info.device, "batch": args.batch, "input_len": args.input_len}
        write_json(args.json, {**header("masked"), **settings, "output_len": args.output_len, "results": rows})


if __name__ == "__main__":
    main()
