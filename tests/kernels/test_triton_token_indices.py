"""Block tables as lists of tokens."""

from __future__ import annotations

import pytest
import torch
from emulation import torch_token_indices
from triton_support import DEVICE, block_tables, int32

from miniserve.kernels.triton.token_indices import token_indices


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("lengths", [[1], [16, 0, 17, 40], [5000, 1, 1024, 1025, 0], [20000]])
def test_every_token_is_listed_once_in_order(lengths: list[int], block_size: int) -> None:
    tables = block_tables(lengths, 1 + sum(lengths), block_size)
    starts, total = int32([0, *torch.tensor(lengths).cumsum(0).tolist()]), sum(lengths)
    out = torch.full((total + 3,), -1, dtype=torch.int32, device=DEVICE)
    token_indices(tables, int32(lengths), starts, out, block_size=block_size, max_seq_len=max(lengths))
    want = [
        int(tables[row, position // block_size]) * block_size + position % block_size
        for row, length in enumerate(lengths)
        for position in range(length)
    ]
    assert out.tolist() == [*want, -1, -1, -1]
    same = torch.full_like(out, -1).cpu()
    given = (tensor.cpu() for tensor in (tables, int32(lengths), starts))
    torch_token_indices(*given, same, block_size=block_size, max_seq_len=max(lengths))
    assert same.tolist() == out.tolist()
