"""What several functions demand alike of tensors, block tables and slots."""

from __future__ import annotations

import torch

from aiter import _standin
from aiter._standin import require


def tensor(name: str, t: object, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    """A tensor of that dtype, and where given of exactly that shape, its elements dense."""
    require(isinstance(t, torch.Tensor), f"{name} must be a tensor: the kernel dereferences it")
    require(t.dtype == dtype, f"{name} must be {dtype}, not {t.dtype}: the kernel reads its bytes as such")
    require(shape is None or tuple(t.shape) == shape, f"{name} must have shape {shape}, not {tuple(t.shape)}")
    require(t.is_contiguous(), f"{name} must be contiguous, not of strides {t.stride()}")


def dense_rows(name: str, t: torch.Tensor) -> None:
    """[T, heads, dim] of which only stride(0) is free."""
    require(t.dim() == 3, f"{name} must be [tokens, heads, dim], not {tuple(t.shape)}")
    require(t.stride()[1:] == (t.shape[2], 1), f"{name}: heads and dims must be dense, not of strides {t.stride()}")


def scale(name: str, t: object) -> None:
    require(isinstance(t, torch.Tensor), f"{name} must be a tensor even for 'auto': the kernel dereferences it")
    require(t.dtype == torch.float32 and t.numel() == 1, f"{name} must be float32 of one element, not {tuple(t.shape)}")


def cache_dtype(kv_cache_dtype: str, cache: torch.Tensor, source: torch.dtype) -> None:
    """The cache's elements against the word that tells the kernel how to read them (its C++ casts without a look)."""
    if kv_cache_dtype == "auto":
        require(cache.dtype == source, f"'auto' reads the cache as {source}, and it is {cache.dtype}")
    else:
        fp8 = _standin.device.fp8
        require(cache.dtype in (fp8, torch.uint8), f"fp8 on {_standin.device.arch} is {fp8}, not {cache.dtype}")


def planes(key: torch.Tensor, value: torch.Tensor) -> None:
    """A K and a V plane of x-packed blocks: K's two outer strides serve both, within a head all is dense."""
    require(key.stride()[:2] == value.stride()[:2], f"K's strides serve V too: {key.stride()} against {value.stride()}")
    for name, plane in (("key_cache", key), ("value_cache", value)):
        require(plane[0, 0].is_contiguous(), f"{name}: a head's part of a block must be dense: {plane.stride()}")


def packed_shapes(key: torch.Tensor, value: torch.Tensor, head_dim: int) -> None:
    """K [NB, KH, D/x, BS, x]; V [NB, KH, BS/x, D, x] or, 4-D, [NB, KH, D, BS]; x = 16 bytes of elements."""
    require(key.dim() == 5, f"key_cache must be [blocks, kv_heads, D/x, block, x], not {tuple(key.shape)}")
    num_blocks, kv_heads, groups, block_size, x = key.shape
    require(x == 16 // key.element_size(), f"x must be {16 // key.element_size()} for {key.dtype}, not {x}")
    require(groups * x == head_dim, f"key_cache holds heads of {groups * x}, the query of {head_dim}")
    shuffled = (num_blocks, kv_heads, block_size // x, head_dim, x)
    want = shuffled if value.dim() == 5 else (num_blocks, kv_heads, head_dim, block_size)
    require(tuple(value.shape) == want, f"value_cache must be {want}, not {tuple(value.shape)}")
    require(block_size % x == 0, f"block size {block_size} is no multiple of x = {x}")
    require(value.dtype == key.dtype, "key and value caches differ in dtype")
    planes(key, value)


def paging(table: torch.Tensor, lens: torch.Tensor, block_size: int, num_blocks: int, max_len: int) -> None:
    """block_tables int32 [S, width] (its rows `width` apart: no kernel takes their stride), lens int32 [S]; every block
    that a length reaches exists."""
    for name, t in (("block_tables", table), ("context_lens", lens)):
        require(t.dtype == torch.int32, f"{name} must be int32, not {t.dtype}: the kernel reads its bytes as such")
        require(t.is_contiguous(), f"{name} must be contiguous, not of strides {t.stride()}")
    longest = int(lens.max()) if lens.numel() else 0
    require(not lens.numel() or int(lens.min()) >= 0, "a context length is negative")
    require(longest <= max_len, f"a context length of {longest} exceeds max_context_len {max_len}")
    blocks = -(-longest // block_size)
    require(
        blocks <= table.shape[1], f"a context length of {longest} needs {blocks} blocks, a row has {table.shape[1]}"
    )
    used = table[:, :blocks][torch.arange(blocks) * block_size < lens[:, None]]
    require(not used.numel() or 0 <= int(used.min()) <= int(used.max()) < num_blocks, "a block id outside the cache")


def slots(slot_mapping: torch.Tensor, num_tokens: int, num_slots: int, exact: bool = False) -> torch.Tensor:
    """slot_mapping -> int64, for the tokens it holds. Negative: the token is skipped."""
    wide = _standin.device.at_least("0.1.20.post2")  # main after 0.1.20.post1 takes int32 too
    if wide:
        _standin.check(
            slot_mapping.dtype in (torch.int32, torch.int64),
            f"slot_mapping must be int32 or int64, got {slot_mapping.dtype}",
        )
    require(wide or slot_mapping.dtype == torch.int64, f"slot_mapping is read as int64, and is {slot_mapping.dtype}")
    require(slot_mapping.dim() == 1 and slot_mapping.is_contiguous(), "slot_mapping must be a dense vector")
    require(
        slot_mapping.shape[0] == num_tokens if exact else slot_mapping.shape[0] >= num_tokens,
        f"slot_mapping has {slot_mapping.shape[0]} entries for {num_tokens} tokens: one side is read out of bounds",
    )
    found = slot_mapping[:num_tokens].long()
    written = found[found >= 0]
    require(not written.numel() or int(written.max()) < num_slots, "a slot outside the cache")
    require(written.unique().numel() == written.numel(), "two tokens share a slot: the kernel's programs would race")
    return found


def indptr(name: str, t: torch.Tensor, total: int | None = None) -> list[int]:
    """A cumulative int32 vector from 0, which must not pass `total` where given. Returned as a list."""
    tensor(name, t, torch.int32)
    values = t.tolist()
    require(values[0] == 0 and values == sorted(values), f"{name} must rise from 0: {values}")
    require(total is None or values[-1] <= total, f"{name} ends at {values[-1]}, the tokens at {total}")
    return values
