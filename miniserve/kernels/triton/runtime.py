"""The Triton kernels of one GPU, with what they share. Imported only where there is a GPU and Triton."""

from __future__ import annotations

import functools

import torch

from miniserve.kernels.triton import elementwise, moe
from miniserve.kernels.triton.small_linear import LinearTile, Workspace, chip_of, choose_tile, small_linear


class TritonKernels:
    """Shapes as in the modules that the functions come from."""

    rms_norm = staticmethod(elementwise.rms_norm)
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    silu_and_mul = staticmethod(elementwise.silu_and_mul)
    norm_rope = staticmethod(elementwise.norm_rope)
    rope_pair = staticmethod(elementwise.rope_pair)
    route = staticmethod(moe.route)
    can_route = staticmethod(moe.can_route)
    experts = staticmethod(moe.experts)

    def __init__(self, device: torch.device) -> None:
        self._workspace = Workspace(device)
        chip = chip_of(device)

        @functools.cache
        def tile(m: int, n: int, k: int, itemsize: int, gated: bool) -> LinearTile | None:
            return choose_tile(m, n, k, itemsize, chip, gated=gated)

        self._tile = tile

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor | None:
        """See `small_linear`; None where the vendor's library serves these shapes better."""
        n = weight.shape[0] // 2 if gated else weight.shape[0]
        tile = self._tile(x.shape[0], n, weight.shape[1], weight.element_size(), gated)
        if tile is None:
            return None
        return small_linear(x, weight, bias, tile, self._workspace, gated=gated, out_dtype=out_dtype)
