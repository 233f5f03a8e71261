"""A runner without a model, for tests of everything around it; and the directory of the built-in tokenizer.

It repeats the prompt for ever, starting at token `seed` of it, so that a test writes down what it will get. It checks
every plan it is given. In the engine process it is chosen with `FACTORY`; options come in the model's name, as in
`fake?step_seconds=0.01`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec

import miniserve
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Request, Step, TokenLogprobs, UserError
from miniserve.models.generation_config import load_generation_defaults

FACTORY = "engine_fakes:build_fake_runner"
TINY = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"


def expected_tokens(prompt: list[int], count: int, seed: int | None = None) -> list[int]:
    start = seed or 0
    return [prompt[(start + index) % len(prompt)] for index in range(count)]


@dataclass
class _Row:
    request: Request
    num_computed: int = 0
    num_output: int = 0
    capacity: int = 0


@dataclass
class FakeRunner:
    block_size: int = 16
    step_seconds: float = 0.0
    fail_at_step: int = -1
    hang_at_step: int = -1
    num_steps: int = 0
    max_in_flight: int = 0
    _rows: dict[int, _Row] = field(default_factory=dict)
    _in_flight: list[Step] = field(default_factory=list)

    def launch(self, step: Step) -> None:
        plan = step.plan
        self.num_steps += 1
        if self.num_steps == self.fail_at_step:
            raise RuntimeError("the fake device broke")
        if self.num_steps == self.hang_at_step:
            time.sleep(600)
        for row in plan.stops:
            del self._rows[row]
        for start in plan.starts:
            assert start.row not in self._rows
            self._rows[start.row] = _Row(start.request, num_output=len(start.output_token_ids))
        for row, _, blocks in plan.new_blocks:
            self._rows[row].capacity += len(blocks) * self.block_size
        tokens, logprobs, prompt_logprobs = [], [], {}
        for row in plan.decode_rows:
            self._rows[row].num_computed += 1
            tokens.append(self._next(row))
        for run in plan.draft_runs:
            state = self._rows[run.row]
            state.num_computed = run.start + len(run.token_ids)
            state.num_output = run.start + 1 - len(state.request.prompt_token_ids)
            tokens += [self._next(run.row) for _ in run.token_ids]
        for chunk in plan.chunks:
            state = self._rows[chunk.row]
            state.num_computed = chunk.start + len(chunk.token_ids)
            if chunk.logprob_targets:
                prompt_logprobs[chunk.row] = [_logprobs(token) for token in chunk.logprob_targets]
            if chunk.samples:
                tokens.append(self._next(chunk.row))
        for row in plan.sampling_rows:
            wanted = self._rows[row].request.params.logprobs is not None
            logprobs.append(_logprobs(tokens[len(logprobs)]) if wanted else None)
        step.on_device = (tokens, logprobs, prompt_logprobs)
        self._in_flight.append(step)
        self.max_in_flight = max(self.max_in_flight, len(self._in_flight))
        assert len(self._in_flight) <= 2

    def collect(self, step: Step) -> None:
        time.sleep(self.step_seconds)
        assert self._in_flight.pop(0) is step
        step.token_ids, step.logprobs, step.prompt_logprobs = step.on_device

    def check(self) -> None:
        pass

    def _next(self, row: int) -> int:
        state = self._rows[row]
        assert state.num_computed <= state.capacity
        state.num_output += 1
        request = state.request
        return expected_tokens(request.prompt_token_ids, state.num_output, request.params.seed)[-1]


def _logprobs(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, [token_id], [-0.5])


def fake_info(config: EngineConfig, model_name: str = "fake", num_blocks: int = 64) -> EngineInfo:
    return EngineInfo(
        model=model_name,
        model_path=str(TINY),
        architecture="Fake",
        dtype="float32",
        device="cpu",
        vocab_size=2048,
        max_model_len=config.max_model_len or 128,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or 2048,
        block_size=config.block_size,
        num_blocks=num_blocks,
        kv_layout="linear",
        enable_prefix_caching=config.enable_prefix_caching,
        async_scheduling=bool(config.async_scheduling),
        eos_token_ids=[],
        memory=[],
        attention=[],
    )


def build_fake_runner(config: EngineConfig, source_path: Path, model_name: str, progress):  # type: ignore[no-untyped-def]
    options = {name: values[0] for name, values in parse_qs(urlsplit(model_name).query).items()}
    match options.get("start"):
        case "user_error":
            raise UserError("The fake device is too small; buy a larger one.")
        case "crash":
            raise ZeroDivisionError("a bug in the runner")
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(600)
    if progress is not None:
        for done in range(3):
            progress("weights", done, 2)
    runner = FakeRunner(
        block_size=config.block_size,
        step_seconds=float(options.get("step_seconds", 0)),
        fail_at_step=int(options.get("fail_at_step", -1)),
        hang_at_step=int(options.get("hang_at_step", -1)),
    )
    info = fake_info(config, model_name, int(options.get("num_blocks", 64)))
    eos_token_ids = load_generation_defaults(source_path, config.generation_config).eos_token_ids
    return runner, msgspec.structs.replace(info, eos_token_ids=sorted(eos_token_ids))
