"""What a model is built for, and the parts that every layer is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from miniserve.attention.aiter import AiterExperts
from miniserve.kernels.native import NativeKernels
from miniserve.models.description import MoEConfig
from miniserve.models.layers.aiter_moe import AiterMoE
from miniserve.models.layers.embedding import LookUp
from miniserve.models.layers.experts import Experts, MoEMethod, choose_moe_method
from miniserve.models.layers.linear import PLAIN, Linear, LinearMethod, PackedMethod, choose_packing
from miniserve.models.layers.norm import RMSNorm
from miniserve.models.layers.ops import NativeOps, Ops
from miniserve.models.layers.routing import RoutingMethod, torch_routing
from miniserve.models.layers.triton import TritonMethod, TritonMoE, TritonOps, triton_routing
from miniserve.parallel.group import Alone, Group, shard_of
from miniserve.parallel.shard import Part, Shard, whole

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a model is built for. device: where its weights will lie. max_model_len: positions the rotary table covers,
    in tokens, None for all that the model has. native: the CPU's kernels, triton: the GPU's, experts: aiter's of an AMD
    GPU, None to do without. group: the ranks that hold it together, this one's part is built. expert_parallel:
    ranks have experts, not parts of each."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    max_model_len: int | None = None
    native: NativeKernels | None = None
    triton: TritonKernels | None = None
    experts: AiterExperts | None = None
    group: Group = field(default_factory=Alone)
    expert_parallel: bool = False

    @property
    def shard(self) -> Shard:
        return shard_of(self.group)

    @property
    def ops(self) -> Ops:
        if self.triton is not None:
            return TritonOps(self.triton)
        return Ops() if self.native is None else NativeOps(self.native)

    @property
    def look_up(self) -> LookUp:
        return functional.embedding if self.native is None else self.native.gather_rows

    def method(self, in_features: int, out_features: int) -> LinearMethod:
        """The fastest there is for a weight [out_features, in_features]."""
        if self.triton is not None:
            return TritonMethod(self.triton)
        packing = choose_packing(self.dtype, self.device, [(in_features, out_features)], self.native)
        return LinearMethod() if packing is PLAIN else PackedMethod(packing)

    def linear(self, columns: int | Part, outputs: Mapping[str, int | Part], *, bias: bool) -> Linear:
        method = self.method(whole(columns).size, sum(whole(rows).size for rows in outputs.values()))
        return Linear(columns, outputs, bias=bias, dtype=self.dtype, method=method)

    def norm(self, size: int, eps: float) -> RMSNorm:
        return RMSNorm(size, eps, self.dtype, self.ops, self.group)

    @property
    def routing(self) -> RoutingMethod:
        return torch_routing if self.triton is None else partial(triton_routing, self.triton)

    def experts_of(self, moe: MoEConfig, hidden_size: int) -> Experts:
        """A layer's: all of this rank's experts, or this rank's part of each."""
        if self.expert_parallel:
            experts, width = self.shard.part(moe.num_experts), whole(moe.intermediate_size)
        else:
            experts, width = whole(moe.num_experts), self.shard.part(moe.intermediate_size)
        method = self.moe_method(hidden_size, width.size)
        return Experts(experts, hidden_size, width, dtype=self.dtype, method=method)

    def moe_method(self, hidden_size: int, intermediate_size: int) -> MoEMethod:
        if self.experts is not None:
            return AiterMoE(self.experts)
        if self.triton is not None:
            return TritonMoE(self.triton)
        return choose_moe_method(self.dtype, self.device, hidden_size, intermediate_size, self.native)
