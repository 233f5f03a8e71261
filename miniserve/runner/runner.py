"""Runs steps on the device: plan in, tokens out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from miniserve.core import Step, StepPlan, TokenLogprobs, TokenMasks
from miniserve.parallel.group import parts_of_all, shard_of
from miniserve.runner.device_timer import DeviceTimer, StepEvents
from miniserve.runner.logprobs import LogprobTensors, gather_logprobs, rows_per_chunk, share_logprobs, to_token_logprobs
from miniserve.runner.sampler import SampleOutput, Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import GraphInputs, StepState

if TYPE_CHECKING:
    from miniserve.runner.chunk_graph import ChunkGraphs


WaitForLogprobs = Callable[[], list[TokenLogprobs]]


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
        token: the second result has its logits, [entries, words of this rank] in the model's dtype, where only such
        rows need be filled. Without tokens all rows are such. Both are valid until the next launch."""
        ...

    def masked(self, masks: TokenMasks) -> torch.Tensor | None:
        """Draw, from the logits that `drawn` left, for rows that need nothing but masks, and pass their tokens on.
        Returns all of the step's tokens, as `drawn` does, or None where the sampler has to do it. No step may be
        running that has masks of its own."""
        ...


@dataclass(slots=True)
class _Work:
    """What the device does for a launched step, in `Step.on_device`. draw: draws its tokens, with `masks`; None where
    there are none. prompt_logprobs: waits for those of a row's chunk. sampled: with host tensors that are valid once
    the last of `events` has passed."""

    draw: Callable[..., SampleOutput] | None = None
    prompt_logprobs: dict[int, WaitForLogprobs] = field(default_factory=dict)
    sampled: SampleOutput | None = None
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
    def launch(self, step: Step) -> None:
        """Enqueue a step; see `core.Runner`."""
        if self._timer is not None:
            self._timer.start()
        for row in step.plan.stops:
            self._sampler.stop_row(row)
            self._prompt_k.pop(row, None)
        for start in step.plan.starts:
            self._sampler.start_row(start)
            if start.request.params.prompt_logprobs is not None:
                self._prompt_k[start.row] = start.request.params.prompt_logprobs
        step.on_device = work = _Work()
        if step.plan.num_tokens:
            work.draw = self._run(step, work)
        if not step.plan.masked:
            self._draw(step, None)

    @torch.inference_mode()
    def sample(self, step: Step, masks: TokenMasks) -> None:
        """Enqueue what `launch` left; see `core.Runner`."""
        self._draw(step, masks)

    def _run(self, step: Step, work: _Work) -> Callable[..., SampleOutput] | None:
        """Enqueue the forward pass; returns what draws the step's tokens, if it has any."""
        plan, graphs = step.plan, self._graphs
        if graphs is not None and not plan.chunks and (bucket := graphs.bucket(plan.num_decode_tokens)) is not None:
            if self._timer is not None:
                step.record.bucket = bucket
            return self._replay(graphs, bucket, plan)
        inputs = self._state.prepare(plan, self._sampler.last_tokens)
        hidden = None if self._chunk_graphs is None else self._chunk_graphs.run(inputs)
        read = None
        if hidden is None:
            read = self._state.read_tokens(plan, inputs)
            batch = replace(inputs.batch, read=read)
            hidden = self._served.hidden(inputs.input_ids, inputs.positions, batch)
        work.prompt_logprobs = self._prompt_logprobs(plan, inputs.chunk_starts, hidden)
        rows = plan.sampling_rows
        if not rows:
            return None
        chosen = hidden if inputs.sample_indices is None or read is not None else hidden[inputs.sample_indices]
        return partial(self._sampler.sample, self._model.compute_logits(chosen), rows, _positions(plan))

    def _draw(self, step: Step, masks: TokenMasks | None) -> None:
        """Enqueue the draw of the tokens, and their copy to the host, which on a CPU is done at once."""
        work: _Work = step.on_device
        if work.draw is not None:
            work.sampled = sampled = work.draw(masks=masks)
            work.draw = None  # frees the logits
            if self._timer is None:
                step.token_ids = sampled.token_ids.tolist()
            else:
                logprobs = None if sampled.logprobs is None else LogprobTensors(*map(_pinned, sampled.logprobs))
                work.sampled = SampleOutput(_pinned(sampled.token_ids), logprobs, sampled.num_logprobs)
        if self._timer is not None:
            work.events = self._timer.end()

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
            draw = partial(self._sampler.sample, logits, rows, positions)
        else:
            draw = partial(self._sampler.complete, tokens, logits, rows, positions)
        if not plan.masked or not self._sampler.wants_masks_alone(rows):
            return draw

        def draw_masked(masks: TokenMasks) -> SampleOutput:
            tokens = graphs.masked(masks)
            return draw(masks=masks) if tokens is None else SampleOutput(tokens, None, (None,) * len(rows))

        return draw_masked

    def is_done(self, step: Step) -> bool:
        """Whether `collect` would not wait."""
        work: _Work = step.on_device
        return work.events is None or work.sampled is None or work.events.end.query()

    def check(self) -> None:
        """See `core.Runner`: a device's errors show in its next step."""

    def collect(self, step: Step) -> None:
        """Wait for a step's result; see `core.Runner`."""
        work: _Work = step.on_device
        step.on_device = None
        if (sampled := work.sampled) is not None:
            if work.events is not None:
                work.events.end.synchronize()
                step.record.device, step.record.idle = work.events.seconds()
                step.token_ids = sampled.token_ids.tolist()
            if sampled.logprobs is not None:
                step.logprobs = to_token_logprobs(step.token_ids, sampled.logprobs, sampled.num_logprobs)
        step.prompt_logprobs = {row: wait() for row, wait in work.prompt_logprobs.items()}

    def _prompt_logprobs(self, plan: StepPlan, starts: list[int], hidden: torch.Tensor) -> dict[int, WaitForLogprobs]:
        """Prompt logprobs of every chunk that has targets, from a few rows of logits at a time: all at once would not
        fit."""
        found: dict[int, WaitForLogprobs] = {}
        for chunk, query_start in zip(plan.chunks, starts, strict=True):
            if targets := chunk.logprob_targets:
                k = self._prompt_k[chunk.row]
                ids = torch.tensor(targets, device=hidden.device)
                step = max(self._least_logit_rows, rows_per_chunk(self._model.config.vocab_size, hidden.device))
                parts = [
                    self._gather_logprobs(
                        hidden[query_start + i : query_start + min(i + step, len(targets))], ids[i : i + step], k
                    )
                    for i in range(0, len(targets), step)
                ]
                tensors = LogprobTensors(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
                found[chunk.row] = partial(_entries, targets, tensors, k)
        return found

    def _gather_logprobs(self, hidden: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobTensors:
        """Of the tokens that follow `hidden`: each rank works on a share of them."""
        logits, group = self._model.compute_logits(hidden), self._model.options.group
        if group.size == 1:
            return gather_logprobs(logits, token_ids, k)
        own = shard_of(group).part(len(hidden)).held
        found = gather_logprobs(group.rows(logits, self._model.config.vocab_size), token_ids[own], k)
        counts = [part.size for part in parts_of_all(group, len(hidden))]
        return share_logprobs(group, found, counts, found.top_ids.shape[1], hidden.device)


def _positions(plan: StepPlan) -> list[int] | None:
    """The position that each sampled token follows from, if the host knows it."""
    if not plan.draft_runs:
        return None
    return plan.run_positions + [chunk.start + len(chunk.token_ids) - 1 for chunk in plan.chunks if chunk.samples]


def _entries(token_ids: list[int], tensors: LogprobTensors, k: int) -> list[TokenLogprobs]:
    found = to_token_logprobs(token_ids, tensors, [k] * len(token_ids))
    return [entry for entry in found if entry is not None]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
