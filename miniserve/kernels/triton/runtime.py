"""The Triton kernels of one GPU, and what they share. Imported only if there is a GPU and Triton."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from miniserve.kernels.triton import cache_write, elementwise, head_linear, moe, moe_token, norm_router, routing
from miniserve.kernels.triton.rounded_linear import rounded_linear
from miniserve.kernels.triton.small_linear import (
    Block,
    Workspace,
    chip_of,
    choose_scaled_tile,
    choose_tile,
    small_linear,
)
from miniserve.kernels.triton.widen import widen

_logger = logging.getLogger(__name__)


def gluon_kernels(name: str, device: torch.device, without: str) -> ModuleType | None:
    """The module `name` of kernels in Gluon. None on GPUs without Hopper's matrix units, and if they fail a trial:
    Gluon is experimental, and this Triton's may differ from the one they were written for. without: what that costs."""
    if device.type != "cuda" or not chip_of(device).wgmma:
        return None
    try:
        module = importlib.import_module(f"miniserve.kernels.triton.{name}")
        module.try_out(device)
    except Exception as error:
        _logger.warning("The Gluon kernel fails here, so %s: %r", without, error)
        return None
    return module


class TritonKernels:
    """Shapes as in the modules that the functions come from."""

    rms_norm = staticmethod(elementwise.rms_norm)
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    silu_and_mul = staticmethod(elementwise.silu_and_mul)
    norm_rope = staticmethod(elementwise.norm_rope)
    norm_rope_latent = staticmethod(cache_write.norm_rope_latent)
    head_linear = staticmethod(head_linear.head_linear)
    can_route = staticmethod(routing.can_route)
    token_experts = staticmethod(moe_token.token_experts)
    add_pairs_norm = staticmethod(moe.add_pairs_norm)

    def __init__(self, device: torch.device) -> None:
        self._workspace = Workspace(device)
        chip = chip_of(device)
        # On a GPU whose programs may not share a row the norm, the router's logits and the choice are separate
        # launches.
        self._norm_fused_tokens = norm_router.FUSED_TOKENS if chip.splits else ()
        self._tile = functools.cache(functools.partial(choose_tile, chip=chip))
        self._chip = chip
        self._medium = gluon_kernels("medium_linear", device, "linear layers of 2 to 256 rows run slower")
        self._large = gluon_kernels("large_linear", device, "SwiGLU and experts of many rows run slower")

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor | None:
        """See `small_linear`, `medium_linear`, `large_linear`; None if the vendor's library is as fast."""
        plain = bias is None and out_dtype is None
        if gated and plain and self._large is not None and self._large.can_gate(x, weight, self._chip):
            found: torch.Tensor = self._large.large_gated(x, weight, self._chip)
            return found
        n = weight.shape[0] // 2 if gated else weight.shape[0]
        sizes = (x.shape[0], n, weight.shape[1], weight.element_size())
        if self._medium is not None and out_dtype is None and self._medium.can_describe(x):
            medium = self._medium.choose_medium_tile(*sizes, self._chip, gated=gated)
            if medium is not None:
                y: torch.Tensor = self._medium.medium_linear(x, weight, bias, medium, gated=gated)
                return y
        tile = self._tile(*sizes, gated=gated)
        if tile is None:
            return None
        return small_linear(x, weight, bias, tile, self._workspace, gated=gated, out_dtype=out_dtype)

    def linear_parts(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """See `medium_linear.linear_parts`; None if a whole product is as fast."""
        if self._medium is None or not self._medium.can_describe(x):
            return None
        tile = self._medium.choose_parts_tile(x.shape[0], *weight.shape, weight.element_size(), self._chip)
        return None if tile is None else self._medium.linear_parts(x, weight, tile)

    def linear_fp8(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        block: tuple[int, int] | None,
        bias: torch.Tensor | None,
        *,
        gated: bool = False,
    ) -> torch.Tensor:
        """As `small_linear` with a weight in 8 bits, for any number of rows."""
        n = weight.shape[0] // 2 if gated else weight.shape[0]
        sizes = x.shape[0], n, weight.shape[1], block
        given: dict[str, Any] = {"gated": gated, "scale": scale, "block": block}
        if self._medium is not None and self._medium.can_describe(x):
            medium = self._medium.choose_scaled_tile(*sizes, self._chip, gated=gated)
            if medium is not None:
                y: torch.Tensor = self._medium.medium_linear(x, weight, bias, medium, **given)
                return y
        tile = choose_scaled_tile(*sizes, self._chip, gated=gated)
        if tile is not None:
            return small_linear(x, weight, bias, tile, self._workspace, **given)
        wide = widen(weight, scale, block, x.dtype)
        found = self.linear(x, wide, bias, gated=gated)
        if found is not None:
            return found
        y = functional.linear(x, wide, bias)
        return self.silu_and_mul(y) if gated else y

    def rounded_linear(self, *given: Any, gated: bool = False) -> torch.Tensor:
        """See the function of that name; gated as `linear_fp8`."""
        y = rounded_linear(*given)
        return self.silu_and_mul(y) if gated else y

    def linear_parts_fp8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
    ) -> torch.Tensor | None:
        """As `linear_parts`, with a weight in 8 bits."""
        if self._medium is None or not self._medium.can_describe(x):
            return None
        sizes = (x.shape[0], *weight.shape, block)
        tile = self._medium.choose_scaled_tile(*sizes, self._chip, gated=False, parts=True)
        return None if tile is None else self._medium.linear_parts(x, weight, tile, scale=scale, block=block)

    def experts(
        self,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        first: int | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        blocks: tuple[Block, Block] = (None, None),
        rounds: bool = False,
    ) -> torch.Tensor:
        """See `moe.experts`."""
        plain = first is None and scales is None
        if plain and self._large is not None and self._large.can_group(x, w1, topk_ids.numel()):
            found: torch.Tensor = self._large.large_experts(x, w1, w2, topk_weights, topk_ids, self._chip)
            return found
        return moe.experts(x, w1, w2, topk_weights, topk_ids, first=first, scales=scales, blocks=blocks, rounds=rounds)

    def add_norm_route(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        **choice: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `norm_router.add_norm_route`: for any number of tokens, and `residual` may be overwritten."""
        if x.shape[0] in self._norm_fused_tokens:
            return norm_router.add_norm_route(x, residual, norm, eps, weight, bias, workspace=self._workspace, **choice)
        normed = self.add_rms_norm(x, residual, norm, eps)
        return normed, residual, *self.route(normed, weight, bias, **choice)

    def route(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **choice: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `routing.route`: the choice of experts for any number of tokens."""
        if routing.has_parts(x):
            return routing.route(routing.logit_parts(x, weight), bias, **choice)
        return routing.route(self.logits(x, weight)[None], bias, **choice)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A router's, float32, of its float32 weight."""
        found = self.linear(x, weight, None, out_dtype=torch.float32)
        return functional.linear(x.float(), weight) if found is None else found
