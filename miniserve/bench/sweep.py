"""`miniserve bench sweep`: throughput and TPOT against concurrency, for several lengths and KV layouts."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from miniserve.bench.report import header
from miniserve.bench.serve import ServeSummary, run
from miniserve.bench.workload import ServeConfig, Shape
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.models.config import describe_model
from miniserve.models.hub import locate_config
from miniserve.server.config import ServerConfig
from miniserve.server.process import ServerEnded, ServerProcess

AS_SERVED = "as served"  # the layout of a server that this sweep did not start
_WARMUP_OUTPUT = 16  # tokens
_LEAST = 4  # requests of a point: one alone has no median
_SHOWN_LINES = 5  # of the log of a server that did not start, or not go on


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Each of `shapes` at each of `concurrencies`, `rounds` requests a client and `_LEAST` at least, against the server
    at `url` or, if that is None, against a new server with `engine`'s settings: with its KV layout, or for "auto" with
    each in turn. Prompts are drawn from the engine's seed.

    Raises `UserError` for settings that conflict.
    """

    engine: EngineConfig
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    shapes: Sequence[Shape]
    concurrencies: Sequence[int]
    rounds: int = 2
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.shapes or not self.concurrencies or min(self.concurrencies) < 1 or self.rounds < 1:
            raise UserError("--lengths and --concurrency need at least one value each, and --rounds must be 1 or more.")
        if self.url is not None and self.engine != EngineConfig(seed=self.engine.seed):
            raise UserError("--url names a running server: leave out options of the engine.")
        if self.url is None and (self.model is not None or self.api_key is not None):
            raise UserError("--served-model and --api-key are for a running server; pass its --url.")
        if self.url is None and max(self.concurrencies) > self.engine.max_num_seqs:
            raise UserError(
                f"--concurrency {max(self.concurrencies)} is more than the engine runs at once; raise --max-num-seqs."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement."""

    layout: str
    shape: Shape
    concurrency: int
    summary: ServeSummary

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "input_len": self.shape.input_len,
            "output_len": self.shape.output_len,
            "concurrency": self.concurrency,
            **self.summary.to_json(),
        }


def place(layout: str, shape: Shape, concurrency: int) -> str:
    """A point of the sweep, in words."""
    return f"{layout}, {shape.input_len}/{shape.output_len}, {concurrency} at a time"


@dataclass(slots=True, kw_only=True)
class SweepResult:
    """`points` in the order measured; `refused`: by layout, why it could not be measured; `missed`: by `place`, why one
    point could not."""

    config: SweepConfig
    model: str = ""
    points: list[Point] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests, and points without any."""
        return len(self.missed) + sum(sum(point.summary.failures.values()) for point in self.points)

    def to_json(self) -> dict[str, Any]:
        config = asdict(self.config) | {"api_key": None if self.config.api_key is None else "***"}
        return {
            **header("sweep"),
            "model": self.model,
            "config": config,
            "refused": self.refused,
            "missed": self.missed,
            "points": [point.to_json() for point in self.points],
        }


def sweep(config: SweepConfig, on_start: Callable[[str], None]) -> Iterator[SweepResult]:
    """Measure everything: the result so far after each point, and all of it at the end. `on_start` is called with what
    comes next.

    A layout whose server does not start is skipped, and the reason recorded. A point whose requests cannot be sent is
    so, too; behind one, and behind a point with failures, the others are measured on a new server. Raises `UserError`
    if nothing can be measured.
    """
    result = SweepResult(config=config)
    layouts = layouts_of(config)
    for layout in layouts:
        # New prompts for each point: none is found in the prefix cache.
        left = deque(enumerate(itertools.product(config.shapes, config.concurrencies), config.engine.seed + 1))
        while left:
            num_left, warm = len(left), False
            try:
                on_start(f"starting a server ({layout})" if config.url is None else f"asking {config.url}")
                with _server(config, layout) as url:
                    on_start(f"{layout}: warming up")
                    warm_up = _warm_up(config, url)
                    run(warm_up)
                    warm = True
                    while left:
                        seed, (shape, concurrency) = left[0]
                        on_start(f"{layout}: {shape.input_len} in, {shape.output_len} out, {concurrency} at a time")
                        load: dict[str, Any] = {"shape": shape, "concurrency": concurrency, "seed": seed}
                        load["num_prompts"] = max(config.rounds * concurrency, _LEAST)
                        found = run(dataclasses.replace(warm_up, **load))
                        left.popleft()
                        point = Point(layout=layout, shape=shape, concurrency=concurrency, summary=found.summary)
                        result.points.append(point)
                        result.model = found.model
                        yield result
                        if found.summary.failures:
                            break
            except UserError as error:
                reason = str(error)
                if warm and len(left) < num_left:
                    on_start(reason)
                    continue  # what was measured last may have ended the server: a new one for what is left
                if not warm and len(left) == len(config.shapes) * len(config.concurrencies):
                    if not result.points and layout == layouts[-1]:
                        raise
                    result.refused[layout] = reason
                    break
                for _ in range(1 if warm else len(left)):
                    _, (shape, concurrency) = left.popleft()
                    result.missed[place(layout, shape, concurrency)] = reason
    yield result


def _warm_up(config: SweepConfig, url: str) -> ServeConfig:
    """As wide as the widest point."""
    most = max(config.concurrencies)
    shortest = min(config.shapes, key=lambda shape: shape.input_len)
    return ServeConfig(
        url=url,
        shape=Shape(input_len=shortest.input_len, output_len=min(shortest.output_len, _WARMUP_OUTPUT)),
        model=config.model,
        api_key=config.api_key,
        num_prompts=most,
        concurrency=most,
        warmup=0,
        ignore_eos=True,
        seed=config.engine.seed,
        timeout=config.timeout,
    )


def layouts_of(config: SweepConfig) -> tuple[str, ...]:
    """The KV layouts to measure. Raises `UserError` if the model's config.json is needed and not found."""
    if config.url is not None:
        return (AS_SERVED,)
    if config.engine.kv_layout != "auto":
        return (config.engine.kv_layout,)
    name, path = locate_config(config.engine.model, config.engine.revision)
    return ("linear", "shuffled") if describe_model(path, name).latent is None else ("latent",)


def _server(config: SweepConfig, layout: str) -> AbstractContextManager[str]:
    if config.url is not None:
        return nullcontext(config.url)
    length = config.engine.max_model_len or max(shape.input_len + shape.output_len for shape in config.shapes)
    return running_server(dataclasses.replace(config.engine, kv_layout=layout, max_model_len=length))


@contextmanager
def running_server(engine: EngineConfig) -> Iterator[str]:
    """Start a server in another process and yield its URL. Raises `UserError` with the end of its log if it does not
    start, or ends by itself."""
    with tempfile.TemporaryFile() as log:
        server = ServerProcess(engine, ServerConfig(port=0), quiet=False, log=log)

        def log_end() -> str:
            log.seek(0)
            return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-_SHOWN_LINES:])

        try:
            with server:
                yield server.url
            if server.exit_code:
                raise UserError(f"The server ended with exit code {server.exit_code}.")
        except ServerEnded:
            raise UserError(f"The server did not start (exit code {server.exit_code}): {log_end()}") from None
        except UserError as error:
            raise UserError(f"{error} The server's log ends: {log_end()}") from error
