"""The draw on a GPU: what the rows' requests ask for, kept there, and the kernels that read it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from miniserve.kernels.triton.sampling import NUM_COLUMNS, RowParams, sample
from miniserve.runner.sampling_transfer import to_device

Array = npt.NDArray[np.generic]


class DeviceDraw:
    """`params` never move, so that graphs can hold on to them."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self.params = RowParams(
            keys=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            prompt_lens=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            numbers=torch.zeros(max_num_seqs, NUM_COLUMNS, dtype=torch.float32, device=device),
        )

    def compile(self, vocab_size: int, dtype: torch.dtype) -> None:
        """Build the kernels that `draw` needs for logits as they come and for edited ones: no request is to wait for
        that."""
        padding = torch.full((1,), -1, dtype=torch.int64, device=self._device)
        for kind in {dtype, torch.float32}:
            self.draw(torch.zeros(1, vocab_size, dtype=kind, device=self._device), padding, padding)

    def set_rows(self, rows: Array, keys: Array, prompt_lens: Array, numbers: Array) -> None:
        """Take over new requests' parameters. Nothing waits. rows, keys, prompt_lens: int64 [num_rows]; numbers:
        float32 [num_rows, 5]: temperature (0: the most likely token), top_k, top_p, min_p, `RowTable.wants_logits`."""
        places = to_device(rows, self._device)
        for kept, new in (
            (self.params.keys, keys),
            (self.params.prompt_lens, prompt_lens),
            (self.params.numbers, numbers),
        ):
            kept.index_copy_(0, places, to_device(new, self._device))

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, num_outputs: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [batch]. logits: [batch, vocab_size] of any float, contiguous; rows, num_outputs: int64 [batch],
        the rows' numbers of output tokens so far."""
        tokens = torch.empty_like(rows)
        sample(logits, rows, self.params, tokens, num_outputs=num_outputs)
        return tokens
