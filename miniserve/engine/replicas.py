"""Several engines with the same model as one: each request goes to one of them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Request, SchedulerStats, StepTotals
from miniserve.engine.build import ProgressCallback
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.output import CompletionStream
from miniserve.engine.tokenizer import Tokenizer, load_tokenizer
from miniserve.models.generation_config import GenerationDefaults

_PIECE = 256  # tokens, by which beginnings of prompts are told apart
_PIECES = 65_536  # that are remembered
_LEAN = 4  # sequences that an engine may have beyond the least, to find what it has of a prompt

Struct = TypeVar("Struct", bound=msgspec.Struct)


class Replicas:
    """Has what the server uses of `AsyncEngine`. A request goes to the engine that runs the fewest sequences, or to one
    that runs few more and has seen the beginning of its prompt.

    `info` is that of the engine with the smallest cache: what it can serve, all can. `engines` are in the order of
    their devices. Where one dies, `dead` says so, and the others take no further requests.
    """

    def __init__(self, engines: Sequence[AsyncEngine]) -> None:
        self.engines = tuple(engines)
        self._seen: OrderedDict[int, int] = OrderedDict()  # which engine had a beginning last, by its hash
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self.generation_defaults: GenerationDefaults

    async def start(self, progress: ProgressCallback | None = None) -> None:
        """As `AsyncEngine.start`: of all of them, or of none. `progress` is told of all together."""
        first, shares = self.engines[0], dict[str, dict[int, int]]()

        def report(number: int, stage: str, done: int, total: int) -> None:
            shares.setdefault(stage, {})[number] = done
            if progress is not None:  # all start with the same work
                progress(stage, sum(shares[stage].values()), total * len(self.engines))

        tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, first.source_path, first.config.load_format))
        starts = [
            asyncio.create_task(engine.start(partial(report, number), tokenizer))
            for number, engine in enumerate(self.engines)
        ]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.shutdown(drain=False)
            raise
        self.info = min((engine.info for engine in self.engines), key=lambda info: info.num_blocks)
        self.tokenizer, self.generation_defaults = first.tokenizer, first.generation_defaults

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool:
        """As `AsyncEngine.shutdown`, of all of them. Returns False where one of them died."""
        return all(await asyncio.gather(*(engine.shutdown(drain, timeout) for engine in self.engines)))

    @property
    def dead(self) -> str | None:
        for number, engine in enumerate(self.engines):
            if engine.died:
                return f"Engine {number} of {len(self.engines)}: {engine.dead}"
        return self.engines[0].dead if all(engine.dead for engine in self.engines) else None

    def generate(self, request: Request) -> CompletionStream:
        """As `AsyncEngine.generate`; an id may run once in each engine."""
        if self.dead is not None:
            raise EngineDead(self.dead)
        return self._choose(request).generate(request)

    def _choose(self, request: Request) -> AsyncEngine:
        loads = [engine.num_sequences for engine in self.engines]
        least, beginnings = min(loads), list(_beginnings(request))
        seen = [self._seen[each] for each in reversed(beginnings) if each in self._seen]
        chosen = next((number for number in seen if loads[number] <= least + _LEAN), loads.index(least))
        for beginning in beginnings:
            self._seen[beginning] = chosen
            self._seen.move_to_end(beginning)
        while len(self._seen) > _PIECES:
            self._seen.popitem(last=False)
        return self.engines[chosen]

    def last_step_age(self) -> float | None:
        """Of the engine whose sign of life is the oldest."""
        ages = [engine.last_step_age() for engine in self.engines]
        return max((age for age in ages if age is not None), default=None)

    @property
    def stats(self) -> SchedulerStats:
        """Sums, and the mean share of the caches in use."""
        stats = _sum([engine.stats for engine in self.engines])
        return msgspec.structs.replace(stats, kv_cache_usage=stats.kv_cache_usage / len(self.engines))

    @property
    def totals(self) -> StepTotals:
        return _sum([engine.totals for engine in self.engines])


Engine = AsyncEngine | Replicas


def make_engine(config: EngineConfig, source_path: Path, model_name: str, step_timeout: float | None) -> Engine:
    """One engine, or as many as the configuration asks for; see `AsyncEngine` for the arguments."""
    engines = [
        AsyncEngine(replace(config, data_parallel_rank=rank), source_path, model_name, step_timeout=step_timeout)
        for rank in range(config.data_parallel_size)
    ]
    return engines[0] if len(engines) == 1 else Replicas(engines)


def _beginnings(request: Request) -> Iterator[int]:
    """Hashes of a prompt's beginnings, the shortest first: what engines cache of it is one of these, about."""
    ids, beginning = request.prompt_token_ids, hash(request.cache_salt)
    for end in range(_PIECE, len(ids) + 1, _PIECE):
        beginning = hash((beginning, *ids[end - _PIECE : end]))
        yield beginning


def _sum(parts: Sequence[Struct]) -> Struct:
    names = parts[0].__struct_fields__
    return type(parts[0])(**{name: sum(getattr(part, name) for part in parts) for name in names})
