"""Multi-head latent attention (DeepSeek-V2, section 2.1): all heads' keys and values are made of one cached latent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.attention.context import StepContext
from miniserve.attention.spec import AttentionSpec, LatentDims, LatentRope
from miniserve.models.description import ModelConfig
from miniserve.models.layers.base import Module
from miniserve.models.layers.linear import Linear, LinearMethod
from miniserve.models.layers.norm import Normed
from miniserve.models.layers.ops import Ops, PendingSum
from miniserve.models.layers.weights import Weights
from miniserve.models.options import BuildOptions
from miniserve.parallel.shard import Part, whole

# That of the norms of both latents, whatever rms_norm_eps says: so it is in DeepSeek's own code and in transformers.
_LATENT_NORM_EPS = 1e-6


class UpProjection(Linear):
    """kv_b_proj: from the latent to every head's key (without rope) and value. One weight, [num_heads * (nope_dim +
    v_head_dim), kv_lora_rank], makes keys and values (`expand`) and takes queries and outputs to and from the latent
    instead (`absorb`, `project_out`: the two matrices absorbed into their neighbours, as section 2.1.2 suggests).

    It is what the layer shows of itself to the attention backend (a `LatentLayer`)."""

    def __init__(
        self,
        layer_index: int,
        spec: AttentionSpec,
        latent: LatentDims,
        device: torch.device,
        heads: Part | None = None,
        *,
        weights: Weights | None = None,
        ops: Ops | None = None,
    ) -> None:
        """heads: those of the checkpoint that are here, None for all. weights: plain or widened, as both uses of it are
        products of many matrices."""
        self._sizes = (latent.nope_dim, latent.v_head_dim)
        rows = (heads or whole(spec.num_heads)).times(sum(self._sizes))
        outputs, method = {"kv_b_proj": rows}, LinearMethod()
        super().__init__(latent.kv_lora_rank, outputs, bias=False, dtype=spec.dtype, method=method, weights=weights)
        self.layer_index, self.spec = layer_index, spec
        self.kv_scale = torch.ones(1, device=device)
        self._ops = ops or Ops()
        self._shape = (spec.num_heads, sum(self._sizes), latent.kv_lora_rank)
        self._key, self._value = torch.empty(0), torch.empty(0)

    def finish(self) -> None:
        super().finish()
        # Views [num_heads, nope_dim, kv_lora_rank] and [num_heads, kv_lora_rank, v_head_dim].
        key, value = self.weight.data.view(self._shape).split(self._sizes, dim=1)
        self._key, self._value = key, value.transpose(1, 2)

    def expand(self, kv_c: Tensor) -> tuple[Tensor, Tensor]:
        """[N, kv_lora_rank] -> k_nope [N, num_heads, nope_dim], v [N, num_heads, v_head_dim]: views of one tensor."""
        both = functional.linear(kv_c, self.weight).unflatten(-1, self._shape[:2])
        k_nope, v = both.split(self._sizes, dim=-1)
        return k_nope, v

    def absorb(self, q_nope: Tensor) -> Tensor:
        """[T, num_heads, nope_dim] -> [T, num_heads, kv_lora_rank]."""
        return self._ops.head_linear(q_nope, self._key)

    def project_out(self, latent_out: Tensor) -> Tensor:
        """[T, num_heads, kv_lora_rank] -> [T, num_heads * v_head_dim]."""
        return self._ops.head_linear(latent_out, self._value).flatten(1)


class LatentSelfAttention(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, latent: LatentDims, layer_index: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.qkv_bias
        heads, _ = options.shard.heads(config.num_heads, config.num_heads)
        self.q_sizes = (latent.nope_dim, latent.rope_dim)
        self.kv_sizes = (latent.kv_lora_rank, latent.rope_dim)
        self.q_lora_rank = config.q_lora_rank
        q_size, kv_size = heads.times(sum(self.q_sizes)), sum(self.kv_sizes)
        self.apart = config.q_lora_rank is None and (bias or options.quantization is not None)
        if self.apart:  # one alone has a bias, or they may differ in their formats
            self.q_proj = options.linear(hidden, {"q_proj": q_size}, bias=False)
            self.kv_a_proj = options.linear(hidden, {"kv_a_proj_with_mqa": kv_size}, bias=bias)
        else:
            # Both read the hidden states: one product instead of two.
            first = {"q_proj": q_size} if config.q_lora_rank is None else {"q_a_proj": config.q_lora_rank}
            self.qkv_a_proj = options.linear(hidden, {**first, "kv_a_proj_with_mqa": kv_size}, bias=bias)
        if config.q_lora_rank is not None:
            self.q_a_layernorm = options.norm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = options.linear(config.q_lora_rank, {"q_b_proj": q_size}, bias=False)
        self.kv_a_layernorm = options.norm(latent.kv_lora_rank, _LATENT_NORM_EPS)
        spec = config.attention_spec(layer_index, options.dtype, options.kv_dtype, options.shard)
        weights = options.widened(["kv_b_proj"])
        self.kv_b_proj = UpProjection(
            layer_index, spec, latent, options.device, heads, weights=weights, ops=options.ops
        )
        self.o_proj = options.linear(heads.times(latent.v_head_dim), {"o_proj": hidden}, bias=config.o_bias)
        self.ops, self.interleaved = options.ops, config.rope_interleaved

    @property
    def attn(self) -> UpProjection:
        return self.kv_b_proj

    def forward(self, x: Normed, cos_sin: Tensor, ctx: StepContext) -> Tensor | PendingSum:
        if self.apart:
            q, kv = self.q_proj(x.read()), self.kv_a_proj(x.read())
        else:
            both = self.qkv_a_proj(x.read())
            q, kv = both.tensor_split((both.shape[1] - sum(self.kv_sizes),), dim=-1)
        if self.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        kv_c, k_pe = kv.split(self.kv_sizes, dim=-1)
        q_nope, q_pe = q.unflatten(-1, (-1, sum(self.q_sizes))).split(self.q_sizes, dim=-1)
        rope = LatentRope(self.kv_a_layernorm.weight, self.kv_a_layernorm.eps, cos_sin, self.interleaved)
        if ctx.fuses_rope:
            out = ctx.attend_latent(self.attn, q_nope, q_pe, kv_c, k_pe, rope)
        else:
            q_pe, kv_c, k_pe = self.ops.norm_rope_latent(q_pe, kv_c, k_pe, rope)
            out = ctx.attend_latent(self.attn, q_nope, q_pe, kv_c, k_pe)
        return self.ops.linear_to_add(self.o_proj, out)
