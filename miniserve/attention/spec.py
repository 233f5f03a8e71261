"""What a layer needs of attention, and what a backend reads of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a model's description has `LatentDims`, and is read without torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LatentDims:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): the cache holds kv_lora_rank + rope_dim elements a token,
    from which each head's key (nope_dim + rope_dim) and value (v_head_dim) are made."""

    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. Heads are those of this device's shard; head_dim in elements; `scale` multiplies q·k.

    sliding_window W: a query at position p sees keys p-W+1 … p. softcap c: scores become c·tanh(score/c).
    sinks: the layer holds one learned logit per head that takes part in the softmax's sum. qk_norm: each head of q and
    k is normed before rope. rotary_dim: the elements of a head that rope turns, None for all.
    latent: of an MLA layer; num_kv_heads is then 1 and head_dim what the cache holds, kv_lora_rank + rope_dim.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: LatentDims | None = None
    qk_norm: bool = False
    rotary_dim: int | None = None

    @property
    def fp8_kv(self) -> bool:
        return self.kv_dtype.itemsize == 1

    @property
    def latent_rank(self) -> int:
        """Elements of a cached token that are kv_c: all of them but for an MLA layer's k_pe."""
        return self.head_dim if self.latent is None else self.latent.kv_lora_rank


class AttentionLayer(Protocol):
    """The part of a model's attention module that a backend reads.

    k_scale, v_scale: float32 [1]; an fp8 cache stores value / scale and is read as code · scale.
    """

    layer_index: int
    spec: AttentionSpec
    sinks: Tensor | None  # float32 [num_heads]
    k_scale: Tensor
    v_scale: Tensor


def fp8_scales(layer: AttentionLayer) -> tuple[Tensor | None, Tensor | None]:
    """The layer's scales where its cache is fp8, which alone has any."""
    return (layer.k_scale, layer.v_scale) if layer.spec.fp8_kv else (None, None)


class LatentLayer(Protocol):
    """The part of an MLA module that a backend reads. kv_scale: float32 [1], of an fp8 cache."""

    layer_index: int
    spec: AttentionSpec
    kv_scale: Tensor

    def absorb(self, q_nope: Tensor) -> Tensor:
        """[T, num_heads, nope_dim] -> [T, num_heads, kv_lora_rank]: queries that meet the latent itself."""
        ...

    def expand(self, kv_c: Tensor) -> tuple[Tensor, Tensor]:
        """[N, kv_lora_rank] -> keys without rope [N, num_heads, nope_dim] and values [N, num_heads, v_head_dim]."""
        ...

    def project_out(self, latent_out: Tensor) -> Tensor:
        """[T, num_heads, kv_lora_rank], what absorbed attention gives, -> [T, num_heads * v_head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class QKRope:
    """What happens to q and k between their projection and attention: a norm of each head where there are weights
    [head_dim], then rope with cos_sin float32 [num_tokens, head_dim], cosines first."""

    cos_sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class LatentRope:
    """As `QKRope` for latent attention: a norm of the latent with weight [kv_lora_rank], and rope of the queries' and
    the key's rotated parts with cos_sin float32 [num_tokens, rope_dim], cosines first; interleaved: neighbours are
    paired instead of halves."""

    weight: Tensor
    eps: float
    cos_sin: Tensor
    interleaved: bool
