"""The KV cache's layouts: where a token's key and value lie in a block.

A cache holds, for one layer, a key plane and a value plane of `num_blocks` blocks of `block_size` tokens. A token's
slot is `block_id * block_size + offset`. The first two layouts take the same bytes per block.

- `linear`:   key and value [num_blocks, block_size, num_kv_heads, head_dim].
- `shuffled`: key [num_blocks, num_kv_heads, head_dim/x, block_size, x],
              value [num_blocks, num_kv_heads, block_size/x, head_dim, x], x = 16 bytes / itemsize:
              what the aiter library calls the asm (shuffle) layout (aiter `reshape_and_cache(asm_layout=True)`).
- `latent`:   of latent attention, in place of keys and values: one plane [num_blocks, block_size, kv_lora_rank +
              rope_dim], kv_c ‖ k_pe of each token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from miniserve.attention.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's key and value planes, dense and separate. Of a latent cache `key` is the one plane, and `value` a
    view of the kv_c in it."""

    key: Tensor
    value: Tensor


class KVLayout(ABC):
    """A layout of one block size. Knows shapes, how to write tokens and how to read blocks back."""

    name: str

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    @staticmethod
    @abstractmethod
    def refusal(spec: AttentionSpec, block_size: int) -> str | None:
        """Why this layout cannot hold the layer, as a sentence; None when it can."""

    @abstractmethod
    def shapes(self, spec: AttentionSpec, num_blocks: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the planes: of keys and of values, or of the one that there is."""

    def write(
        self,
        cache: KVCache,
        k: Tensor,
        v: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Store k, v [num_tokens, num_kv_heads, head_dim] at slot_mapping [num_tokens] int64 (every slot >= 0).

        k_scale, v_scale float32 [1], of an fp8 cache: it stores value / scale, limited to the largest code.
        """
        self.store(cache, _encode(k, cache.key.dtype, k_scale), _encode(v, cache.value.dtype, v_scale), slot_mapping)

    @abstractmethod
    def store(self, cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """As `write`, of k and v as the cache holds them."""

    @abstractmethod
    def gather(self, cache: KVCache, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read blocks: block_ids [...] -> k, v [..., block_size, num_kv_heads, head_dim], as the cache holds them."""

    @abstractmethod
    def gather_tokens(self, cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Read tokens: slots int64 [n] -> k, v [n, num_kv_heads, head_dim], as the cache holds them."""

    def block_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of one block of one layer, all planes together."""
        return sum(map(math.prod, self.shapes(spec, 1))) * spec.kv_dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: torch.device) -> KVCache:
        """A zeroed cache: a block never written must not hold NaN, which a masked kernel may still multiply by 0."""
        planes = (torch.zeros(shape, dtype=spec.kv_dtype, device=device) for shape in self.shapes(spec, num_blocks))
        return KVCache(*planes)


class LinearLayout(KVLayout):
    name = "linear"

    @staticmethod
    def refusal(spec: AttentionSpec, block_size: int) -> str | None:
        return _NO_LATENT if spec.latent is not None else None

    def shapes(self, spec: AttentionSpec, num_blocks: int) -> tuple[tuple[int, ...], ...]:
        shape = (num_blocks, self.block_size, spec.num_kv_heads, spec.head_dim)
        return shape, shape

    def store(self, cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        _bits(cache.key).flatten(0, 1).index_copy_(0, slot_mapping, _bits(k))
        _bits(cache.value).flatten(0, 1).index_copy_(0, slot_mapping, _bits(v))

    def gather(self, cache: KVCache, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        return _take(cache.key, block_ids), _take(cache.value, block_ids)

    def gather_tokens(self, cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        return _take(cache.key.flatten(0, 1), slots), _take(cache.value.flatten(0, 1), slots)


class ShuffledLayout(KVLayout):
    name = "shuffled"

    @staticmethod
    def refusal(spec: AttentionSpec, block_size: int) -> str | None:
        if spec.latent is not None:
            return _NO_LATENT
        x = _lanes(spec.kv_dtype)
        if block_size % x:
            return f"the shuffled layout needs a block size that is a multiple of {x} for this dtype, not {block_size}"
        if spec.head_dim % x:
            return f"the shuffled layout needs a head_dim that is a multiple of {x}, not {spec.head_dim}"
        return None

    def shapes(self, spec: AttentionSpec, num_blocks: int) -> tuple[tuple[int, ...], ...]:
        x = _lanes(spec.kv_dtype)
        return (
            (num_blocks, spec.num_kv_heads, spec.head_dim // x, self.block_size, x),
            (num_blocks, spec.num_kv_heads, self.block_size // x, spec.head_dim, x),
        )

    def store(self, cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        num_tokens, num_kv_heads, head_dim = k.shape
        x = cache.key.shape[-1]
        block, offset = slot_mapping // self.block_size, slot_mapping % self.block_size
        _bits(cache.key)[block, :, :, offset] = _bits(k.reshape(num_tokens, num_kv_heads, head_dim // x, x))
        _bits(cache.value)[block, :, offset // x, :, offset % x] = _bits(v)

    def gather(self, cache: KVCache, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        k = _take(cache.key, block_ids).movedim(-2, -4).flatten(-2)  # [..., BS, KH, D]
        v = _take(cache.value, block_ids).movedim(-1, -2).flatten(-3, -2).movedim(-3, -2)  # via [..., KH, BS, D]
        return k.contiguous(), v.contiguous()

    def gather_tokens(self, cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        block, offset = slots // self.block_size, slots % self.block_size
        x = cache.key.shape[-1]
        k = _bits(cache.key)[block, :, :, offset].flatten(-2)
        v = _bits(cache.value)[block, :, offset // x, :, offset % x]
        return k.view(cache.key.dtype), v.view(cache.value.dtype)


class LatentLayout(KVLayout):
    """Here k and v are kv_c [num_tokens, kv_lora_rank] and k_pe [num_tokens, rope_dim], with one scale for both, and
    what `gather` and `gather_tokens` find has these two last dimensions. Negative slots are not written."""

    name = "latent"

    @staticmethod
    def refusal(spec: AttentionSpec, block_size: int) -> str | None:
        return "the latent layout holds latent (MLA) attention only" if spec.latent is None else None

    def shapes(self, spec: AttentionSpec, num_blocks: int) -> tuple[tuple[int, ...], ...]:
        return ((num_blocks, self.block_size, spec.head_dim),)

    def store(self, cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        kept = slot_mapping >= 0
        _bits(cache.key).flatten(0, 1)[slot_mapping[kept]] = torch.cat([_bits(k), _bits(v)], dim=-1)[kept]

    def gather(self, cache: KVCache, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(cache, _take(cache.key, block_ids))

    def gather_tokens(self, cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(cache, _take(cache.key.flatten(0, 1), slots))

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: torch.device) -> KVCache:
        (shape,) = self.shapes(spec, num_blocks)
        plane = torch.zeros(shape, dtype=spec.kv_dtype, device=device)
        return KVCache(plane, plane[..., : spec.latent_rank])

    @staticmethod
    def _split(cache: KVCache, tokens: Tensor) -> tuple[Tensor, Tensor]:
        rank = cache.value.shape[-1]
        return tokens[..., :rank], tokens[..., rank:]


LAYOUTS: dict[str, type[KVLayout]] = {"linear": LinearLayout, "shuffled": ShuffledLayout, "latent": LatentLayout}

_NO_LATENT = "it does not hold latent (MLA) attention"


def decoded(
    found: tuple[Tensor, Tensor], dtype: torch.dtype, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `gather` or `gather_tokens` found as values of `dtype`: an fp8 cache's codes times their scales."""
    k, v = (
        codes.to(dtype) if codes.dtype.itemsize > 1 or scale is None else (codes.float() * scale).to(dtype)
        for codes, scale in zip(found, (k_scale, v_scale), strict=True)
    )
    return k, v


def _lanes(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _take(plane: Tensor, block_ids: Tensor) -> Tensor:
    taken = _bits(plane).index_select(0, block_ids.reshape(-1)).view(*block_ids.shape, *plane.shape[1:])
    return taken.view(plane.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as a dtype that indexing knows: PyTorch moves fp8 on no CPU."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _encode(values: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    if dtype.itemsize > 1:
        return values.to(dtype)
    limit = torch.finfo(dtype).max
    scaled = values.float() if scale is None else values.float() / scale
    return scaled.clamp(-limit, limit).to(dtype)
