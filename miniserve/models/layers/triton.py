"""A decoder's operations, linear layers, routing and experts on a GPU, through the Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from miniserve.attention.spec import AttentionSpec, LatentRope, QKRope
from miniserve.models.layers.experts import Experts, MoEMethod
from miniserve.models.layers.linear import Linear, LinearMethod
from miniserve.models.layers.norm import Normed
from miniserve.models.layers.ops import Ops, PendingSum, split_heads
from miniserve.models.layers.routing import Chosen, Router, route
from miniserve.parallel.group import Group

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels


class TritonMethod(LinearMethod):
    """The weight as it is, [out_features, in_features]: our kernel for few rows, the vendor's library for many."""

    def __init__(self, kernels: TritonKernels) -> None:
        self._kernels = kernels

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        y = self._kernels.linear(x, layer.weight, layer.bias)
        return functional.linear(x, layer.weight, layer.bias) if y is None else y

    def gated(self, layer: Linear, x: Tensor) -> Tensor | None:
        return self._kernels.linear(x, layer.weight, layer.bias, gated=True)


class TritonOps(Ops):
    """Through the Triton kernels."""

    def __init__(self, kernels: TritonKernels) -> None:
        self._kernels = kernels

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._kernels.rms_norm(x, weight, eps)

    def norm_rope_latent(
        self, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, how: LatentRope
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = how.weight, how.eps, how.cos_sin
        self._kernels.norm_rope_latent(q_pe, kv_c, k_pe, *given, interleaved=how.interleaved)
        return q_pe, kv_c, k_pe

    def head_linear(self, x: Tensor, weights: Tensor) -> Tensor:
        y = self._kernels.head_linear(x, weights)
        return super().head_linear(x, weights) if y is None else y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._kernels.add_rms_norm(x, residual, weight, eps), residual

    def reduce_norm(
        self, x: Tensor | PendingSum, residual: Tensor, weight: Tensor, eps: float, group: Group
    ) -> tuple[Tensor, Tensor]:
        if group.inboxes is None or not group.inboxes.take(residual):
            return super().reduce_norm(x, residual, weight, eps, group)
        parts, shared = (x, None) if isinstance(x, Tensor) else (x.parts, x.shared)
        return group.inboxes.reduce_norm(parts, shared, residual, weight, eps), residual

    def split_norm_rope(self, qkv: Tensor, spec: AttentionSpec, rope: QKRope) -> tuple[Tensor, Tensor, Tensor]:
        heads = {"num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
        self._kernels.norm_rope(qkv, rope.cos_sin, rope.q_weight, rope.k_weight, rope.eps, **heads)
        return split_heads(qkv, spec)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._kernels.silu_and_mul(gate_up)

    def gated_linear(self, layer: Linear, x: Tensor) -> Tensor:
        y = layer.method.gated(layer, x)
        return self._kernels.silu_and_mul(layer(x)) if y is None else y

    def linear_to_add(self, layer: Linear, x: Tensor) -> Tensor | PendingSum:
        if layer.bias is not None:
            parts = None
        elif layer.weight.dtype.itemsize == 1:
            parts = self._kernels.linear_parts_fp8(x, layer.weight, layer.weight_scale, layer.weights.steps["weight"])
        else:
            parts = self._kernels.linear_parts(x, layer.weight)
        return layer(x) if parts is None else PendingSum(self._kernels, parts)

    def choose_experts(self, router: Router, x: Normed) -> Chosen:
        moe, bias, kernels = router.moe, router.e_score_correction_bias, self._kernels
        if not kernels.can_route(moe.num_experts, moe.num_groups, moe.top_groups):
            return route(kernels.logits(x.read(), router.weight), moe, bias)
        choice = {
            "top_k": moe.top_k,
            "num_groups": moe.num_groups,
            "top_groups": moe.top_groups,
            "sigmoid": moe.scoring == "sigmoid",
            "normalize": moe.normalize,
            "scaling": moe.scaling,
        }

        def with_norm(part: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Chosen]:
            normed, stream, *chosen = kernels.add_norm_route(part, stream, weight, eps, router.weight, bias, **choice)
            return normed, stream, (chosen[0], chosen[1])

        return x.read_with(with_norm) or kernels.route(x.read(), router.weight, bias, **choice)


class TritonMoE(MoEMethod):
    """The weights as they are, codes widened as they are read, or in steps of many rows what is multiplied with them
    rounded to 8 bits."""

    def __init__(self, kernels: TritonKernels) -> None:
        self._kernels = kernels

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        given: dict[str, Any] = {}
        if layer.num_experts < layer.experts.count:
            given["first"] = layer.experts.held.start
        if layer.w1.dtype.itemsize == 1:
            steps = layer.weights.steps
            given |= {"scales": (layer.w1_scale, layer.w2_scale), "blocks": (steps["w1"], steps["w2"])}
        if self.route is not None and self.route.rounds(x.shape[0]):
            given["rounds"] = True
        if x.shape[0] == 1:
            out: Tensor = self._kernels.token_experts(x, layer.w1, layer.w2, topk_weights, topk_ids, **given)
            return out
        return PendingSum(self._kernels, self._kernels.experts(x, layer.w1, layer.w2, topk_weights, topk_ids, **given))
