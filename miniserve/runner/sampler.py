"""From logits to tokens, for the whole batch at once.

What happens to a row, in the order of vLLM: logit_bias, min_tokens, repetition penalty, frequency and presence penalty;
then the argmax where temperature is 0, else temperature, min_p, top_k, top_p and a draw (`sampling_draw`).

What the requests asked for lies in a table on the host (`sampling_rows`), so that a step knows without a look at the
device which of this is needed. What changes with every token lies on the device. On a GPU kernels draw (`DeviceDraw`),
also within graphs for the rows that need no more than that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from miniserve.core import RowStart
from miniserve.runner import sampling_blocks
from miniserve.runner.logprobs import LogprobTensors, gather_logprobs
from miniserve.runner.sampling_draw import draw
from miniserve.runner.sampling_penalties import SeenTokens
from miniserve.runner.sampling_rows import Batch, RowTable

if TYPE_CHECKING:
    from miniserve.runner.sampling_device import DeviceDraw


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """token_ids: int64 [num_rows] on the device. `logprobs` has a row for each entry of `num_logprobs` that is not
    None, in order, and is None where all are; `to_token_logprobs` puts both together once they are on the host."""

    token_ids: torch.Tensor
    logprobs: LogprobTensors | None
    num_logprobs: tuple[int | None, ...]


class Sampler:
    """Draws a token for each row of the runner's persistent state; keeps what that needs from step to step.

    `last_tokens` and `num_outputs` (int64 [max_num_seqs], on the device) hold each row's last sampled token and its
    number of output tokens.

    Until a row has `min_tokens` output tokens, neither an EOS token (ignore_eos or not) nor one of its stop_token_ids
    is drawn. A row's tokens are a function of its logits, its parameters and its stream of random numbers, which starts
    from the request's seed or, without one, from `seed` and the request's id. `device_draw`: what draws instead of
    PyTorch.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        eos_token_ids: Collection[int],
        seed: int = 0,
        device_draw: DeviceDraw | None = None,
    ) -> None:
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.num_outputs = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._device_draw = device_draw
        self._table = RowTable(max_num_seqs, vocab_size, device, eos_token_ids, seed, grouped=device_draw is None)
        self._seen = SeenTokens(max_num_seqs, vocab_size, device)
        self._batch_rows: list[int] = []
        self._batch: Batch | None = None
        self._started: list[int] = []  # rows that `device_draw` has yet to hear of

    def start_row(self, start: RowStart) -> None:
        """A request takes a free row. Raises `InvalidRequest` for a logit_bias beyond the vocabulary."""
        self._table.start_row(start)
        self._batch = None
        self._started.append(start.row)
        self.num_outputs[start.row].fill_(len(start.output_token_ids))  # item assignment would wait for the device
        if self._table.penalised[start.row]:
            self._seen.start_row(start.row, start.request.prompt_token_ids, start.output_token_ids)

    def stop_row(self, row: int) -> None:
        """The row is free again."""
        self._table.stop_row(row)
        self._batch = None

    def upload(self) -> None:
        """Tell `device_draw` of the rows that have started since; before a graph draws."""
        if self._device_draw is not None and self._started:
            self._device_draw.set_rows(*self._table.draw_params(self._started))
        self._started.clear()

    def sample(self, logits: torch.Tensor, rows: list[int], positions: list[int] | None = None) -> SampleOutput:
        """Draw the next token of each of `rows`, which are all taken.

        logits: contiguous [len(rows), vocab_size] of any float dtype, may be overwritten. On an asynchronous device
        nothing waits. A row may come more than once, unless it is penalised, where the host knows the `positions` that
        the logits follow from; `last_tokens` and `num_outputs` then say nothing until a request takes the row.
        """
        self.upload()
        batch = self._prepare(rows)
        if positions is None:
            num_outputs = self.num_outputs.index_select(0, batch.rows)
        else:
            num_outputs = self._table.num_outputs(rows, positions)
        raw = None
        if batch.logprobs is not None:
            raw = logits[batch.logprobs.positions]
            overwritten = logits.dtype == torch.float32 and (batch.edits_logits or bool(batch.groups))
            if overwritten and isinstance(batch.logprobs.positions, slice):
                raw = raw.clone()
        if batch.edits_logits or self._device_draw is None:
            logits = logits.float()
        self._edit(logits, batch, num_outputs)
        tokens = self._draw(logits, batch, num_outputs)
        self.last_tokens.index_copy_(0, batch.rows, tokens)
        self.num_outputs.index_add_(0, batch.rows, batch.ones)
        if batch.penalties is not None:
            self._seen.record(tokens, batch.penalties)
        if raw is None or batch.logprobs is None:
            return SampleOutput(tokens, None, batch.num_logprobs)
        logprobs = gather_logprobs(raw, tokens[batch.logprobs.positions], batch.logprobs.most)
        return SampleOutput(tokens, logprobs, batch.num_logprobs)

    def takes_argmax(self, rows: list[int]) -> bool:
        """Whether `sample` would give each row's most likely token and nothing more."""
        return self._table.take_argmax(rows)

    def complete(
        self, tokens: torch.Tensor, logits: torch.Tensor, rows: list[int], positions: list[int] | None = None
    ) -> SampleOutput:
        """The rest of a step in which a graph drew `tokens`, int64 [len(rows)], for all rows but those that want their
        logits: what `sample` does, for these. Their places in `logits` are filled."""
        num_logprobs: list[int | None] = [None] * len(rows)
        left = np.flatnonzero(self._table.wants_logits[rows])
        if not len(left):
            return SampleOutput(tokens, None, tuple(num_logprobs))
        places = self._table.places(left)
        known = None if positions is None else [positions[place] for place in left]
        sampled = self.sample(logits[places], [rows[place] for place in left], known)
        tokens[places] = sampled.token_ids
        for place, count in zip(left, sampled.num_logprobs, strict=True):
            num_logprobs[place] = count
        return SampleOutput(tokens, sampled.logprobs, tuple(num_logprobs))

    def _draw(self, logits: torch.Tensor, batch: Batch, num_outputs: torch.Tensor) -> torch.Tensor:
        if self._device_draw is not None:
            return self._device_draw.draw(logits, batch.rows, num_outputs)
        tokens = sampling_blocks.argmax(logits) if batch.any_greedy else torch.empty_like(batch.rows)
        for group in batch.groups:
            tokens[group.positions] = draw(logits[group.positions], num_outputs[group.positions], group.params)
        return tokens

    def _prepare(self, rows: list[int]) -> Batch:
        if self._batch is None or self._batch_rows != rows:
            self._batch_rows = list(rows)
            self._batch = self._table.batch(self._batch_rows)
        return self._batch

    def _edit(self, logits: torch.Tensor, batch: Batch, num_outputs: torch.Tensor) -> None:
        """Everything that changes single logits, in place."""
        flat = logits.view(-1)
        if batch.bias is not None:
            flat.index_add_(0, batch.bias.places, batch.bias.values)
        if batch.early_stops is not None:
            stops = batch.early_stops
            early = num_outputs[stops.positions] < stops.min_tokens
            flat[stops.places] = flat[stops.places].masked_fill_(early, float("-inf"))
        if batch.penalties is not None:
            self._seen.penalise(logits, batch.penalties)
