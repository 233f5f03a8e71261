"""Runs steps on the device: plan in, tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from miniserve.core import DeviceStep, StepPlan, StepResult, TokenLogprobs, TokenMasks
from miniserve.runner.device_timer import DeviceTimer, StepEvents
from miniserve.runner.logprobs import LogprobTensors, gather_logprobs, rows_per_chunk, to_token_logprobs
from miniserve.runner.sampler import SampleOutput, Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import GraphInputs, StepState

if TYPE_CHECKING:
    from miniserve.runner.chunk_graph import ChunkGraphs


class StepGraphs(Protocol):
    """Steps of decode rows alone that run without Python around their kernels."""

    def bucket(self, num_rows: int) -> int | None:
        """The number of entries of the graph for a step of so many decode rows, None if there is none."""
        ...

    def greedy(self, bucket: int, inputs: GraphInputs) -> torch.Tensor:
        """Launch a step and pass each row's most likely token to the next one. Returns the tokens, int64 [entries],
        valid until the next launch."""
        ...

    def drawn(self, bucket: int, inputs: GraphInputs) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Launch a step and draw each row's token as its request says. A row that needs the host's sampler gets no
        token: the second result has its logits, [entries, vocab_size] in the model's dtype, where only such rows need
        be filled. Without tokens all rows are such. Both are valid until the next launch."""
        ...


@dataclass(frozen=True, slots=True)
class _PromptLogprobs:
    """One chunk's prompt logprobs: the row, the tokens that follow each of its positions, and the number of
    alternatives."""

    row: int
    targets: list[int]
    num_logprobs: int
    tensors: LogprobTensors


@dataclass(frozen=True, slots=True)
class _Undrawn:
    """A launched step whose tokens are still to be drawn: `draw(masks=...)` does it."""

    draw: Callable[..., SampleOutput]
    prompt_logprobs: list[_PromptLogprobs]
    bucket: int


@dataclass(frozen=True, slots=True)
class _Launched:
    """A launched step. On a GPU: host tensors that are valid once the last of `events` has passed. On a CPU, where the
    step is done already: a list of its tokens. `bucket`: rows of the graph that runs it, 0 for none."""

    token_ids: torch.Tensor | list[int] | None
    num_logprobs: Sequence[int | None]
    logprobs: LogprobTensors | None
    prompt_logprobs: list[_PromptLogprobs]
    bucket: int = 0
    events: StepEvents | None = None


class ModelRunner:
    """Implements `core.Runner`. Launches run in stream order: state may be advanced as soon as a step is enqueued."""

    def __init__(
        self,
        served: ServedModel,
        state: StepState,
        sampler: Sampler,
        graphs: StepGraphs | None = None,
        chunk_graphs: ChunkGraphs | None = None,
    ) -> None:
        self._served, self._model = served, served.model
        self._state = state
        self._sampler = sampler
        self._graphs = graphs
        self._chunk_graphs = chunk_graphs
        on_cpu = self._model.options.device.type == "cpu"
        self._timer = None if on_cpu else DeviceTimer()
        # Prompt tokens at a time: enough to make good use of reading the head's weight.
        self._least_logit_rows = 16 if on_cpu else 512
        self._prompt_k: dict[int, int] = {}  # row -> alternatives per prompt token, if requested

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> _Launched | _Undrawn:
        """Enqueue a step; see `core.Runner`."""
        if self._timer is not None:
            self._timer.start()
        for row in plan.stops:
            self._sampler.stop_row(row)
            self._prompt_k.pop(row, None)
        for start in plan.starts:
            self._sampler.start_row(start)
            if start.request.params.prompt_logprobs is not None:
                self._prompt_k[start.row] = start.request.params.prompt_logprobs
        if not plan.num_tokens:
            return self._to_host(None, [])
        bucket = None
        if self._graphs is not None and not plan.chunks:
            bucket = self._graphs.bucket(plan.num_decode_tokens)
        if self._graphs is not None and bucket is not None:
            step = _Undrawn(self._replay(self._graphs, bucket, plan), [], bucket)
            return step if plan.masked else self._drawn(step)
        inputs = self._state.prepare(plan, self._sampler.last_tokens)
        hidden = None if self._chunk_graphs is None else self._chunk_graphs.run(inputs)
        if hidden is None:
            hidden = self._served.hidden(inputs.input_ids, inputs.positions, inputs.batch)
        prompt_logprobs = self._prompt_logprobs(plan, inputs.chunk_starts, hidden)
        rows = plan.sampling_rows
        if not rows:
            return self._to_host(None, prompt_logprobs)
        chosen = hidden if inputs.sample_indices is None else hidden[inputs.sample_indices]
        draw = partial(self._sampler.sample, self._model.compute_logits(chosen), rows, _positions(plan))
        step = _Undrawn(draw, prompt_logprobs, 0)
        return step if plan.masked else self._drawn(step)

    @torch.inference_mode()
    def sample(self, handle: object, masks: TokenMasks) -> _Launched:
        """Enqueue what `launch` left; see `core.Runner`."""
        if not isinstance(handle, _Undrawn):
            raise TypeError("sample takes what launch returned for a plan with masked rows")
        return self._drawn(handle, masks)

    def _drawn(self, step: _Undrawn, masks: TokenMasks | None = None) -> _Launched:
        return self._to_host(step.draw(masks=masks), step.prompt_logprobs, step.bucket)

    def _replay(self, graphs: StepGraphs, bucket: int, plan: StepPlan) -> Callable[..., SampleOutput]:
        """Replay a step; returns what draws its tokens, or the rest of them."""
        inputs = self._state.prepare_graph(plan)
        rows, positions = inputs.rows, _positions(plan)
        if self._sampler.takes_argmax(rows):
            sampled = SampleOutput(graphs.greedy(bucket, inputs), None, (None,) * len(rows))
            return lambda masks: sampled
        self._sampler.upload()
        tokens, logits = graphs.drawn(bucket, inputs)
        if tokens is None:
            return partial(self._sampler.sample, logits, rows, positions)
        return partial(self._sampler.complete, tokens, logits, rows, positions)

    def collect(self, handle: object) -> StepResult:
        """Wait for a step's result; see `core.Runner`."""
        if not isinstance(handle, _Launched):
            raise TypeError("collect takes what launch returned")
        device = None
        if handle.events is not None:
            device = DeviceStep(handle.bucket)
            if handle.token_ids is not None:  # a step without a token is not waited for
                handle.events.end.synchronize()
                device = DeviceStep(handle.bucket, *handle.events.seconds())
        token_ids = handle.token_ids.tolist() if isinstance(handle.token_ids, torch.Tensor) else handle.token_ids or []
        logprobs = None
        if handle.logprobs is not None:
            logprobs = to_token_logprobs(token_ids, handle.logprobs, handle.num_logprobs)
        prompt_logprobs = {chunk.row: _entries(chunk) for chunk in handle.prompt_logprobs}
        return StepResult(token_ids, logprobs, prompt_logprobs, device)

    def _prompt_logprobs(self, plan: StepPlan, starts: list[int], hidden: torch.Tensor) -> list[_PromptLogprobs]:
        """Prompt logprobs of every chunk that has targets, from a few rows of logits at a time: all at once would not
        fit."""
        found: list[_PromptLogprobs] = []
        for chunk, query_start in zip(plan.chunks, starts, strict=True):
            if targets := chunk.logprob_targets:
                k = self._prompt_k[chunk.row]
                ids = torch.tensor(targets, device=hidden.device)
                step = max(self._least_logit_rows, rows_per_chunk(self._model.config.vocab_size, hidden.device))
                parts = [
                    gather_logprobs(
                        self._model.compute_logits(hidden[query_start + i : query_start + min(i + step, len(targets))]),
                        ids[i : i + step],
                        k,
                    )
                    for i in range(0, len(targets), step)
                ]
                tensors = LogprobTensors(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
                found.append(_PromptLogprobs(chunk.row, targets, k, tensors))
        return found

    def _to_host(
        self, sampled: SampleOutput | None, prompt_logprobs: list[_PromptLogprobs], bucket: int = 0
    ) -> _Launched:
        if sampled is None:
            events = None if self._timer is None else self._timer.end()
            return _Launched(None, (), None, prompt_logprobs, bucket, events)
        if self._timer is None:
            return _Launched(sampled.token_ids.tolist(), sampled.num_logprobs, sampled.logprobs, prompt_logprobs)
        logprobs = None if sampled.logprobs is None else LogprobTensors(*map(_pinned, sampled.logprobs))
        token_ids = _pinned(sampled.token_ids)
        return _Launched(token_ids, sampled.num_logprobs, logprobs, prompt_logprobs, bucket, self._timer.end())


def _positions(plan: StepPlan) -> list[int] | None:
    """The position that each sampled token follows from, if the host knows it."""
    if not plan.draft_runs:
        return None
    return plan.run_positions + [chunk.start + len(chunk.token_ids) - 1 for chunk in plan.chunks if chunk.samples]


def _entries(chunk: _PromptLogprobs) -> list[TokenLogprobs]:
    found = to_token_logprobs(chunk.targets, chunk.tensors, [chunk.num_logprobs] * len(chunk.targets))
    return [entry for entry in found if entry is not None]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
