# mypy: disable-error-code="assignment, misc"
"""Decode of latent attention by Hopper's matrix units: what `mla_decode` computes, for the shapes that `can_decode`
names.

The keys are the left operand and the heads the right one, so that 16 heads fill an instruction: scores are [keys,
heads], and the result is [latent, heads], whose left operand is the same tile of latents, turned. A tile comes by TMA
(copies by descriptor, a block of the cache each), two of them by turns; those that are older than the step are fetched
before the queries are there.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from miniserve.kernels.triton.common import LOG2E
from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import describe, quick
from miniserve.kernels.triton.split_kv import DecodeScratch, merge_splits, scratch_arrays, share_of

KEYS = 64  # of a tile
_STAGES = 2
# Of a thread, of eight warps: half a multiprocessor's. The rest is for kernels that start while this one ends.
_REGISTERS, _PRODUCER_REGISTERS = 128, 96
_CHUNK = 64  # columns that lie together in shared memory: 128 bytes, a row of a swizzled tile
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)
_MOST_HEADS, _RANK, _ROPE = 16, 512, 64


@gluon.jit
def _places(tables, tile, num_keys, block_rows, ROWS: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Where the pieces of a tile begin in the cache: blocks of it, or 64 keys of one."""
    BLOCKS: gl.constexpr = 64 // ROWS
    found = ()
    for block in gl.static_range(BLOCKS):
        first = tile * 64 + block * ROWS
        # Blocks behind the last key have no place in the table. Any block will do, as nobody sees it.
        id = gl.load(tables + gl.minimum(first, num_keys - 1) // BLOCK_SIZE)
        found += (id * block_rows + first % BLOCK_SIZE,)
    return found


@gluon.jit
def _fetch(desc, latents, ropes, ready, stage, places):
    """Have a tile copied: its latents to chunks of 64 columns, and the parts that are rotated."""
    STAGES: gl.constexpr = ready.type.shape[0]
    CHUNKS: gl.constexpr = latents.type.shape[0] // STAGES
    ROWS: gl.constexpr = desc.block_type.shape[0]
    BLOCKS: gl.constexpr = 64 // ROWS
    parts = latents._reinterpret(desc.dtype, [STAGES * CHUNKS * BLOCKS, ROWS, 64], desc.layout)
    rope_parts = ropes._reinterpret(desc.dtype, [STAGES * BLOCKS, ROWS, 64], desc.layout)
    done = ready.index(stage)
    mbarrier.expect(done, (CHUNKS + 1) * 64 * 128)
    for block in gl.static_range(BLOCKS):
        row = places[block]
        for chunk in gl.static_range(CHUNKS):
            to = parts.index((stage * CHUNKS + chunk) * BLOCKS + block)
            tma.async_copy_global_to_shared(desc, [row, chunk * 64], done, to)
        tma.async_copy_global_to_shared(desc, [row, CHUNKS * 64], done, rope_parts.index(stage * BLOCKS + block))


@gluon.jit
def _produce(
    desc, latents, ropes, ready, free, tables, begin, middle, end, num_keys, block_rows,
    BLOCK_SIZE: gl.constexpr, SETTLED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: tiles before `middle`, which are older than the step, and once it may those from there."""
    if SETTLED:
        _fetch_all(desc, latents, ropes, ready, free, tables, begin, begin, middle, num_keys, block_rows, BLOCK_SIZE)
        wait(PDL)
    _fetch_all(desc, latents, ropes, ready, free, tables, begin, middle, end, num_keys, block_rows, BLOCK_SIZE)


@gluon.jit
def _fetch_all(
    desc, latents, ropes, ready, free, tables, begin, low, high, num_keys, block_rows, BLOCK_SIZE: gl.constexpr
):
    STAGES: gl.constexpr = ready.type.shape[0]
    ROWS: gl.constexpr = desc.block_type.shape[0]
    for tile in range(low, high):
        i = tile - begin
        places = _places(tables, tile, num_keys, block_rows, ROWS, BLOCK_SIZE)
        mbarrier.wait(free.index(i % STAGES), (i // STAGES - 1) & 1, pred=i >= STAGES)
        _fetch(desc, latents, ropes, ready, i % STAGES, places)


@gluon.jit
def _load_queries(qs, q, step, live, CHUNKS: gl.constexpr, layout: gl.constexpr):
    """[heads, CHUNKS * 64] of one row, to shared memory."""
    heads = gl.arange(0, qs.type.shape[1], gl.SliceLayout(1, layout))[:, None]
    at = q + heads * step + gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    for chunk in gl.static_range(CHUNKS):
        qs.index(chunk).store(gl.load(at + chunk * 64, mask=heads < live, other=0.0))


@gluon.jit
def _consume(
    latents, ropes, qs, pes, ws, ready, free, q, q_pe, out, partial, lse, row, split, begin, end, seq_len,
    strides, qk_scale, num_splits, HEADS: gl.constexpr, RANK: gl.constexpr, SINGLE: gl.constexpr,
    SETTLED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warpgroup that multiplies."""
    q_row, q_head, pe_row, pe_head, out_row, out_head = strides
    STAGES: gl.constexpr = ready.type.shape[0]
    CHUNKS: gl.constexpr = RANK // 64
    N: gl.constexpr = ws.type.shape[0]
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    by_head: gl.constexpr = gl.SliceLayout(0, of_out)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_store: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [4, 1], [0, 1])
    values = latents._reinterpret(ws.dtype, [STAGES, 64, RANK], latents.layout)
    if SETTLED:
        wait(PDL)
    _load_queries(qs, q + row * q_row, q_head, HEADS, CHUNKS, flat)
    _load_queries(pes, q_pe + row * pe_row, pe_head, HEADS, 1, flat)
    fence_async_shared()

    best = gl.full((N,), -1.0e30, gl.float32, by_head)  # finite, so that it makes no NaN
    total = gl.zeros((64, N), gl.float32, of_out)  # summed over the keys once, after the loop
    acc = gl.zeros((RANK, N), gl.float32, of_out)
    key = gl.arange(0, 64, gl.SliceLayout(1, of_out))
    for tile in range(begin, end):
        i = tile - begin
        stage = i % STAGES
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        if (tile + 1) * 64 > seq_len:
            # What was never written may be NaN, which a weight of 0 does not hide.
            there = (tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, flat)) < seq_len)[:, None]
            for chunk in gl.static_range(CHUNKS):
                part = latents.index(stage * CHUNKS + chunk)
                part.store(gl.where(there, part.load(flat), 0.0))
            fence_async_shared()
        scores = gl.zeros((64, N), gl.float32, of_out)
        for chunk in gl.static_range(CHUNKS):
            left = latents.index(stage * CHUNKS + chunk)
            scores = warpgroup_mma(left, qs.index(chunk).permute((1, 0)), scores, use_acc=chunk > 0, is_async=True)
        scores = warpgroup_mma(ropes.index(stage), pes.index(0).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where((tile * 64 + key < seq_len)[:, None], scores * qk_scale, float("-inf"))
        higher = gl.maximum(best, gl.max(scores, 0))
        decay = gl.exp2(best - higher)[None, :]
        best = higher
        weights = gl.exp2(scores - higher[None, :])
        total = total * decay + weights
        acc = acc * decay
        ws.permute((1, 0)).store(weights.to(ws.dtype))
        fence_async_shared()
        acc = warpgroup_mma(values.index(stage).permute((1, 0)), ws.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(stage))

    start(PDL)
    denominator = gl.sum(total, 0)
    acc = acc / denominator[None, :]
    r = gl.arange(0, RANK, gl.SliceLayout(1, of_store))[:, None]
    head = gl.arange(0, N, gl.SliceLayout(0, of_store))[None, :]
    if SINGLE:
        out_at = out + row * out_row + head * out_head + r
        gl.store(out_at, gl.convert_layout(acc.to(ws.dtype), of_store), mask=head < HEADS)
    else:
        entry = (row * HEADS + head) * num_splits + split
        gl.store(partial + entry * RANK + r, gl.convert_layout(acc, of_store), mask=head < HEADS)
        own = gl.arange(0, N, by_head)
        gl.store(lse + (row * HEADS + own) * num_splits + split, best + gl.log2(denominator), mask=own < HEADS)


@quick
@gluon.jit(do_not_specialize=["table_row", "num_splits", "fresh"])
def _hopper_mla_kernel(
    q, q_pe, desc, block_tables, seq_lens, out, partial, lse,
    q_row, q_head, pe_row, pe_head, out_row, out_head, block_rows, table_row, qk_scale, num_splits, fresh,
    HEADS: gl.constexpr, N: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    SINGLE: gl.constexpr, SETTLED: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program: one row, one split of its keys, all heads. Scores are base 2."""
    CHUNKS: gl.constexpr = RANK // 64
    if not SETTLED:
        wait(PDL)
    split = gl.program_id(0)
    row = gl.program_id(1).to(gl.int64)
    seq_len = gl.load(seq_lens + row)
    _, begin, end, _ = share_of(split, seq_len, 0, num_splits, 64, False)
    if begin >= end:
        if SETTLED:
            wait(PDL)
        if split == 0:
            of_zeros: gl.constexpr = gl.BlockedLayout([8, 1], [32, 1], [2, 2], [0, 1])
            r = gl.arange(0, RANK, gl.SliceLayout(1, of_zeros))[:, None]
            head = gl.arange(0, N, gl.SliceLayout(0, of_zeros))[None, :]
            zeros = gl.zeros((RANK, N), out.dtype.element_ty, of_zeros)
            gl.store(out + row * out_row + head * out_head + r, zeros, mask=head < HEADS)
        return
    middle = begin
    if SETTLED:
        middle = gl.minimum(gl.maximum(begin, (seq_len - fresh) // 64), end)

    dtype: gl.constexpr = desc.dtype
    layout: gl.constexpr = desc.layout
    latents = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 64, 64], layout)
    ropes = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], layout)
    qs = gl.allocate_shared_memory(dtype, [CHUNKS, N, 64], layout)
    pes = gl.allocate_shared_memory(dtype, [1, N, 64], layout)
    ws = gl.allocate_shared_memory(dtype, [N, 64], layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    strides = (q_row, q_head, pe_row, pe_head, out_row, out_head)
    # In a variable the tuples' constants would become values.
    gl.warp_specialize(
        [
            (_consume, (
                latents, ropes, qs, pes, ws, ready, free, q, q_pe, out, partial, lse, row, split, begin, end, seq_len,
                strides, qk_scale, num_splits, HEADS, RANK, SINGLE, SETTLED, PDL,
            )),
            (_produce, (
                desc, latents, ropes, ready, free, block_tables + row * table_row, begin, middle, end, seq_len,
                block_rows, BLOCK_SIZE, SETTLED, PDL,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def splits_of(rows: int, max_seq_len: int, num_sms: int) -> int:
    """How many programs share one row's keys: as many as fill the device, which runs one on each multiprocessor."""
    return max(1, min(num_sms // rows, cdiv(max_seq_len, KEYS)))


def can_decode(q: torch.Tensor, q_pe: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether `hopper_mla` takes these."""
    _, block_size, width = kv_cache.shape
    dims = q.shape[2], q_pe.shape[2], width
    lies = kv_cache.stride(0) % kv_cache.stride(1) == 0 and kv_cache.stride(1) % 8 == 0 and kv_cache.stride(2) == 1
    power = block_size >= 8 and block_size & (block_size - 1) == 0
    same = q.dtype == kv_cache.dtype and q.dtype.itemsize == 2
    return same and power and lies and q.shape[1] <= _MOST_HEADS and dims == (_RANK, _ROPE, _RANK + _ROPE)


def hopper_mla(
    q: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    num_splits: int = 1,
    fresh: int | None = None,
    scratch: DecodeScratch | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `mla_decode`, for what `can_decode` allows."""
    rows, heads, rank = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    partial, lse, _ = scratch_arrays(scratch, num_splits)
    blocks, block_size, width = kv_cache.shape
    block_rows = kv_cache.stride(0) // kv_cache.stride(1)
    strides = (kv_cache.stride(1), 1)
    desc = describe(kv_cache, (blocks * block_rows, width), strides, (min(block_size, KEYS), _CHUNK), _LAYOUT)
    settled = fresh is not None
    _hopper_mla_kernel[(num_splits, rows)](
        q, q_pe, desc, block_tables, seq_lens, out, partial, lse, *q.stride()[:2], *q_pe.stride()[:2],
        *out.stride()[:2], block_rows, block_tables.stride(0), scale * LOG2E, num_splits, fresh or 0,
        HEADS=heads, N=max(16, next_power_of_2(heads)), RANK=rank, STAGES=_STAGES, BLOCK_SIZE=block_size,
        SINGLE=num_splits == 1, SETTLED=settled, PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        num_warps=4, maxnreg=_REGISTERS, **launch_options(q.device),
    )  # fmt: skip
    if num_splits > 1 and scratch is not None:
        merge_splits(scratch, seq_lens, out, block_n=KEYS, num_splits=num_splits, settled=settled)
    return out


def try_out(device: torch.device) -> None:
    """Attend once. Raises RuntimeError if the result is wrong, and whatever Triton raises if it cannot compile the
    kernel."""
    length, head = 150, torch.arange(4, device=device)
    latent = torch.arange(192, device=device)[:, None].repeat(1, _RANK + _ROPE).to(torch.float16)
    latent[length:] = float("nan")  # keys that no query sees
    q = torch.zeros(1, 4, _RANK + _ROPE, dtype=latent.dtype, device=device)
    q[0, :, -1] = head  # a head sees the later keys alone, the more the higher it is
    tables, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[*range(12)]], [length]))
    scratch = DecodeScratch.allocate([(1, 2)], 4, _RANK, device)
    out = hopper_mla(
        q[..., :_RANK], q[..., _RANK:], latent.view(12, 16, -1), tables, lens, scale=1.0, num_splits=2, scratch=scratch
    )
    keys = latent[:length, 0].double()
    want = (keys * head[:, None]).softmax(1) @ keys
    if not torch.allclose(out[0].double(), want[:, None].expand(-1, _RANK), rtol=2e-3):
        raise RuntimeError("queries that weigh late keys most do not get their values")
