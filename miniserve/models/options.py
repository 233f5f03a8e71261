"""What a model is built for, and the parts that every layer is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from miniserve.attention.aiter import AiterProducts
from miniserve.attention.platform import Platform
from miniserve.core import UserError
from miniserve.kernels.native import NativeKernels
from miniserve.models.description import MoEConfig
from miniserve.models.layers.aiter_linear import aiter_blockscale
from miniserve.models.layers.aiter_moe import AiterMoE
from miniserve.models.layers.contracts import (
    AITER_BLOCKSCALE,
    AITER_MOE,
    EXPERTS,
    LIBRARY_FP8,
    LINEAR,
    TRITON_ROUTER,
    Product,
    ProductContract,
    Route,
    find_route,
)
from miniserve.models.layers.experts import Experts, choose_moe_method, expert_matrices
from miniserve.models.layers.linear import (
    PLAIN,
    Linear,
    LinearMethod,
    PackedMethod,
    ScaledMethod,
    ScaledProduct,
    choose_packing,
    widened_product,
)
from miniserve.models.layers.norm import RMSNorm
from miniserve.models.layers.ops import NativeOps, Ops
from miniserve.models.layers.triton import TritonMethod, TritonMoE, TritonOps
from miniserve.models.layers.weights import CODES, LEAST_STEP, ScaledWeights, Weights, placed, step_of
from miniserve.models.quantization import Quantization, WeightFormat
from miniserve.parallel.group import Alone, Group, shard_of
from miniserve.parallel.shard import Part, Shard, whole

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a model is built for. device: where its weights will lie. max_model_len: positions the rotary table covers,
    in tokens, None for all that the model has. native: the CPU's kernels, triton: the GPU's, aiter: its products on an
    AMD GPU, None to do without. group: the ranks that hold it together, this one's part is built. expert_parallel:
    ranks have experts, not parts of each. platform: the hardware; None: any that these kernels are for. failed: what is
    wrong with kernels of `layers/contracts.py`, by name. fp8_activations: what is multiplied with weights in 8 bits may
    be rounded to them where the checkpoint asks for that. quantization: the model's. prefix: the name of the module
    that is being built."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    max_model_len: int | None = None
    native: NativeKernels | None = None
    triton: TritonKernels | None = None
    aiter: AiterProducts | None = None
    group: Group = field(default_factory=Alone)
    expert_parallel: bool = False
    platform: Platform | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    fp8_activations: bool = True
    quantization: Quantization | None = None
    prefix: str = ""

    @property
    def shard(self) -> Shard:
        return shard_of(self.group)

    def within(self, name: str) -> BuildOptions:
        """For the module of that name in this one."""
        return replace(self, prefix=f"{self.prefix}.{name}" if self.prefix else name)

    def width(self, count: int) -> Part:
        """This rank's part of an MLP's middle: of scaled weights in steps that kernels take, if each has one."""
        coarse = self.quantization is not None and count >= LEAST_STEP * self.shard.size
        return self.shard.part(count, LEAST_STEP if coarse else 1)

    @property
    def fp8_dtype(self) -> torch.dtype:
        """The hardware's."""
        return CODES if self.platform is None else self.platform.fp8_dtype

    @property
    def ops(self) -> Ops:
        if self.triton is not None:
            return TritonOps(self.triton)
        return Ops() if self.native is None else NativeOps(self.native)

    @property
    def router_ops(self) -> Ops:
        """PyTorch's where the kernels were found to choose wrong experts."""
        return Ops() if TRITON_ROUTER in self.failed else self.ops

    @property
    def _place(self) -> torch.device:
        """Where layers multiply; of a model that is only described for a GPU, meta."""
        return torch.device("cpu") if self.platform is not None and self.platform.arch == "cpu" else self.device

    def method(self, in_features: int, out_features: int) -> LinearMethod:
        """The fastest there is for a plain weight [out_features, in_features]."""
        if self.triton is not None:
            return TritonMethod(self.triton)
        packing = choose_packing(self.dtype, self._place, [(in_features, out_features)], self.native)
        return LinearMethod() if packing is PLAIN else PackedMethod(packing)

    def linear(self, columns: int | Part, outputs: Mapping[str, int | Part], *, bias: bool) -> Linear:
        """Raises `UserError` where a checkpoint has some of the outputs' matrices in another format than others."""
        form, parts = self._format(outputs), placed(columns, outputs)
        size, out_features = whole(columns).size, sum(part.rows.size for part in parts.values())
        # What divides those of every rank, which so take the same kernels.
        rows = math.gcd(out_features, *(part.rows.sizes for part in parts.values()))
        across = math.gcd(size, whole(columns).sizes)
        product = Product(self.dtype, rows=rows, columns=across, wide=self._wide(form))
        if form is not None:
            step = step_of(form, parts.values())
            product = replace(product, grain=form.grain, step=step, cut=step)
        route = self._route(LINEAR, product)
        widened = form is not None and not route.kernels
        if form is None or widened:
            method = self.method(size, out_features)
        else:
            products = [*map(self._scaled_product, route.kernels), ScaledProduct(widened_product)]
            method = ScaledMethod(products)
        method.route = route
        if widened:
            plain = self._route(LINEAR, Product(self.dtype))
            method.name = f"{plain.sentence(method.name)}, widened from 8 bits"
        weights = self._weights(form, widened=widened)
        return Linear(columns, outputs, bias=bias, dtype=self.dtype, method=method, weights=weights)

    def _wide(self, form: WeightFormat | None) -> str:
        """See `Product`."""
        if form is not None and not form.inputs:
            return "this checkpoint has 8 bits for weights alone"
        return "" if self.fp8_activations else "--no-fp8-activations keeps their 16"

    def _weights(self, form: WeightFormat | None, *, widened: bool) -> Weights:
        return Weights() if form is None else ScaledWeights(form, self.fp8_dtype, widened=widened)

    def _route(self, table: Sequence[ProductContract], product: Product) -> Route:
        """Of a model that is only described its platform says what there is. Why a known platform's aiter is not there
        the route says."""
        told = () if self.platform is None else ("aiter", "triton") if self._place.type == "meta" else ("aiter",)
        here = [each for each in table if each.requires in told or getattr(self, each.requires) is not None]
        return find_route(here, product, self.platform, self.failed)

    def _scaled_product(self, contract: ProductContract) -> ScaledProduct:
        if contract.name == AITER_BLOCKSCALE:
            return aiter_blockscale(cast(AiterProducts, self.aiter), contract.first_row)
        if self.triton is None:  # of a model that is only described
            return ScaledProduct(widened_product)
        if contract.name == LIBRARY_FP8:
            return ScaledProduct(self.triton.rounded_linear, contract.first_row, gates=True)
        return ScaledProduct(self.triton.linear_fp8, gates=True)

    def widened(self, modules: Iterable[str]) -> Weights:
        """Plain weights in the end, also where the checkpoint has these modules' matrices in 8 bits."""
        return self._weights(self._format(modules), widened=True)

    def _format(self, modules: Iterable[str]) -> WeightFormat | None:
        if self.quantization is None:
            return None
        names = [f"{self.prefix}.{module}" if self.prefix else module for module in modules]
        forms = {name: self.quantization.format_of(name) for name in names}
        if len(set(forms.values())) > 1:
            raise UserError(
                f"config.json's quantization_config gives {' and '.join(names)} different formats, but they are "
                "multiplied as one matrix: quantise all of them or none."
            )
        return forms[names[0]]

    def norm(self, size: int, eps: float) -> RMSNorm:
        return RMSNorm(size, eps, self.dtype, self.ops, self.group)

    def experts_of(self, moe: MoEConfig, hidden_size: int) -> Experts:
        """A layer's: all of this rank's experts, or this rank's part of each. Raises `UserError` as `linear` does."""
        if self.expert_parallel:
            experts, width = self.shard.part(moe.num_experts), whole(moe.intermediate_size)
        else:
            experts, width = whole(moe.num_experts), self.width(moe.intermediate_size)
        w1, w2 = expert_matrices(hidden_size, width).values()
        form, product = self._format(f"0.{name}" for name in (*w1, *w2)), Product(self.dtype)
        if form is not None:
            step = step_of(form, w1.values(), w2.values())
            cut = step_of(form, [w1["gate_proj"]])
            product = Product(self.dtype, form.grain, step, cut, wide=self._wide(form))
        route = self._route(EXPERTS, product)
        widened = form is not None and not route.kernels
        plain = self._route(EXPERTS, Product(self.dtype)) if widened else route
        if not plain.kernels:
            method = choose_moe_method(self.dtype, self._place, hidden_size, width.size, self.native)
        elif plain.kernels[0].name == AITER_MOE:
            method = AiterMoE(cast(AiterProducts, self.aiter))
        else:
            method = TritonMoE(cast("TritonKernels", self.triton))
        method.route = route
        if widened:
            method.name = f"{plain.sentence(method.name)}, widened from 8 bits"
        weights = self._weights(form, widened=widened)
        return Experts(experts, hidden_size, width, dtype=self.dtype, method=method, weights=weights)
