# mypy: disable-error-code="assignment, misc"
"""Prefill attention by Hopper's matrix units: what `paged_extend` computes, for the shapes that `can_extend` names, and
the same over dense keys and values (`hopper_dense`), as the chunks of latent attention have them.

Two warpgroups multiply, each with 64 (token, query head) pairs of one kv head, and one warp keeps a ring of key and
value tiles filled (TMA: copies by descriptor, a block of the cache each). A warpgroup starts the next tile's scores
before the softmax of the last one, so that its matrix unit seldom waits (FlashAttention-3, Shah et al. 2024). Tiles are
visited from the last one, which alone has masked keys, to the first.
"""

from __future__ import annotations

from typing import Any

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
from miniserve.kernels.triton.launch import cdiv
from miniserve.kernels.triton.quick_launch import describe, quick

_ROWS, _GROUPS = 64, 2  # pairs of a warpgroup, warpgroups
_BLOCK_N = 128  # keys of a tile
_CHUNK = 64  # columns that lie together in shared memory: 128 bytes, a row of a swizzled tile
_REGISTERS, _PRODUCER_REGISTERS = 232, 24
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)  # which takes longer to make than a descriptor
DENSE_DIMS = (128, 64, 128)  # of keys without rope, of what all heads share, of values
_SHARED_BYTES, _MOST_STAGES = 226 << 10, 4  # without the barriers


@gluon.jit
def _fetch(
    desc, tiles, ready, part, key, tables, table, num_keys, rows, column, CHUNKS: gl.constexpr, BLOCK_SIZE: gl.constexpr
):  # fmt: skip
    """A tile's keys or values, from `key` on, to its parts of 64 columns: a copy for each of them and each block. rows:
    of a block; without tables: where the request's keys start."""
    ROWS: gl.constexpr = desc.block_type.shape[0]
    BLOCKS: gl.constexpr = tiles.type.shape[1] // ROWS
    parts = tiles._reinterpret(desc.dtype, [tiles.type.shape[0] * BLOCKS, ROWS, 64], desc.layout)
    for block in gl.static_range(BLOCKS):
        first = key + block * ROWS
        if tables is None:
            row = rows + first
        else:
            # Blocks behind the last key have no place in the table. Any block will do, as nobody sees it.
            row = gl.load(tables + table + gl.minimum(first, num_keys - 1) // BLOCK_SIZE) * rows + first % BLOCK_SIZE
        for chunk in gl.static_range(CHUNKS):
            to = parts.index((part + chunk) * BLOCKS + block)
            tma.async_copy_global_to_shared(desc, [row, column + chunk * 64], ready, to)


@gluon.jit
def _produce(
    k_desc, pe_desc, v_desc, ks, vs, barriers, tables, table, num_keys, last, count, k_rows, v_rows, k_column, v_column,
    BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """Keeps the ring filled with the tiles last, last - 1, …"""
    k_ready, k_free, v_ready, v_free = barriers
    STAGES: gl.constexpr = k_ready.type.shape[0]
    BLOCK_N: gl.constexpr = ks.type.shape[1]
    K_CHUNKS: gl.constexpr = ks.type.shape[0] // STAGES
    V_CHUNKS: gl.constexpr = vs.type.shape[0] // STAGES
    OWN: gl.constexpr = K_CHUNKS if pe_desc is None else K_CHUNKS - 1
    for i in range(count):
        stage = i % STAGES
        turn = (i // STAGES - 1) & 1
        key = (last - i) * BLOCK_N
        mbarrier.wait(k_free.index(stage), turn, pred=i >= STAGES)
        ready = k_ready.index(stage)
        mbarrier.expect(ready, K_CHUNKS * BLOCK_N * 128)
        part = stage * K_CHUNKS
        _fetch(k_desc, ks, ready, part, key, tables, table, num_keys, k_rows, k_column, OWN, BLOCK_SIZE)
        if pe_desc is not None:  # which all heads share
            _fetch(pe_desc, ks, ready, part + OWN, key, tables, table, num_keys, k_rows, 0, 1, BLOCK_SIZE)
        mbarrier.wait(v_free.index(stage), turn, pred=i >= STAGES)
        ready = v_ready.index(stage)
        mbarrier.expect(ready, V_CHUNKS * BLOCK_N * 128)
        part = stage * V_CHUNKS
        _fetch(v_desc, vs, ready, part, key, tables, table, num_keys, v_rows, v_column, V_CHUNKS, BLOCK_SIZE)


@gluon.jit
def _scores(qs, ks, ready, i, layout: gl.constexpr):
    """Of the i-th tile that is visited, not yet waited for."""
    STAGES: gl.constexpr = ready.type.shape[0]
    CHUNKS: gl.constexpr = qs.type.shape[0]
    mbarrier.wait(ready.index(i % STAGES), (i // STAGES) & 1)
    ROWS: gl.constexpr = qs.type.shape[1]
    BLOCK_N: gl.constexpr = ks.type.shape[1]
    scores = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
    for chunk in gl.static_range(CHUNKS):
        keys = ks.index(i % STAGES * CHUNKS + chunk).permute((1, 0))
        scores = warpgroup_mma(qs.index(chunk), keys, scores, use_acc=chunk > 0, is_async=True)
    return scores


@gluon.jit
def _add_values(weights, vs, ready, i, acc):
    """acc and the i-th visited tile's values, weighted; not yet waited for."""
    STAGES: gl.constexpr = ready.type.shape[0]
    values = vs._reinterpret(vs.dtype, [STAGES, vs.type.shape[1], acc.shape[1]], vs.layout)
    mbarrier.wait(ready.index(i % STAGES), (i // STAGES) & 1)
    return warpgroup_mma(weights, values.index(i % STAGES), acc, is_async=True)


@gluon.jit
def _softmax(
    scores, best, total, first_key, query_pos, qk_scale, window, MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr
):
    """The running softmax, base 2, with a tile's scores. Returns weights, maximum, sum and the earlier sums' factor."""
    if MASKED:
        BLOCK_N: gl.constexpr = scores.shape[1]
        rows: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        distance = query_pos[:, None] - (first_key + gl.arange(0, BLOCK_N, rows))[None, :]
        seen = distance >= 0
        if HAS_WINDOW:
            seen = seen & (distance < window)
        scores = gl.where(seen, scores, float("-inf"))
    higher = gl.maximum(best, gl.max(scores, 1) * qk_scale)
    decay = gl.exp2(best - higher)
    weights = gl.exp2(scores * qk_scale - higher[:, None])
    return weights, higher, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _visit(
    begin, end, weights, best, total, acc, qs, ks, vs, barriers, last, query_pos, qk_scale, window,
    MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Tiles last - begin … last - end + 1: their scores while the values of the tile before are added."""
    k_ready, k_free, v_ready, v_free = barriers
    STAGES: gl.constexpr = k_ready.type.shape[0]
    layout: gl.constexpr = query_pos.type.layout.parent
    for i in range(begin, end):
        scores = _scores(qs, ks, k_ready, i, layout)
        acc = _add_values(weights, vs, v_ready, i - 1, acc)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(i % STAGES))
        first_key = (last - i) * ks.type.shape[1]
        found, best, total, decay = _softmax(
            scores, best, total, first_key, query_pos, qk_scale, window, MASKED, HAS_WINDOW
        )
        found = gl.convert_layout(found.to(qs.dtype), weights.type.layout)
        # Waiting for what the softmax finds as well keeps the compiler from moving it behind the wait.
        acc, weights, found = warpgroup_mma_wait(0, deps=[acc, weights, found])
        mbarrier.arrive(v_free.index((i - 1) % STAGES))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
        weights = found
    return weights, best, total, acc


@gluon.jit
def _clear(vs, ready, i, first_key, low, high, CHUNKS: gl.constexpr, layout: gl.constexpr):
    """Zero the i-th visited tile's values outside [low, high): what was never written may be NaN, which a weight of 0
    does not hide. Both warpgroups store the same."""
    STAGES: gl.constexpr = ready.type.shape[0]
    BLOCK_N: gl.constexpr = vs.type.shape[1]
    mbarrier.wait(ready.index(i % STAGES), (i // STAGES) & 1)
    keys = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    there = ((keys >= low) & (keys < high))[:, None]
    for chunk in gl.static_range(CHUNKS):
        tile = vs.index(i % STAGES * CHUNKS + chunk)
        tile.store(gl.where(there, tile.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _consume(
    qs, first_pair, ks, vs, barriers, q_ptr, out_ptr, lse_ptr, sinks_ptr, strides, where, qk_scale, window,
    GROUP: gl.constexpr, V_DIM: gl.constexpr, CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 pairs, from first_pair on."""
    q_row, q_head, out_row, out_head, lse_head = strides
    kv_head, first_token, query_len, num_keys, last, count, full, low = where
    k_ready, k_free, v_ready, _v_free = barriers
    CHUNKS: gl.constexpr = qs.type.shape[0]
    ROWS: gl.constexpr = qs.type.shape[1]
    BLOCK_N: gl.constexpr = ks.type.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)

    pair = first_pair + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    token, head = pair // GROUP, kv_head * GROUP + pair % GROUP
    row = (first_token + token).to(gl.int64)
    mine = (token < query_len)[:, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, flat))[None, :]
    at = q_ptr + (row * q_row + head * q_head)[:, None] + columns
    for chunk in gl.static_range(CHUNKS):
        qs.index(chunk).store(gl.load(at + chunk * 64, mask=mine, other=0.0))
    fence_async_shared()

    pair = first_pair + gl.arange(0, ROWS, gl.SliceLayout(1, of_scores))
    query_pos = num_keys - 1 + pair * 0
    if CAUSAL:
        query_pos = num_keys - query_len + gl.minimum(pair // GROUP, query_len - 1)
    # Finite, so that a row that sees no key of a tile makes no NaN.
    best = gl.full((ROWS,), -1.0e30, gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, of_scores))
    if sinks_ptr is not None:
        best = gl.load(sinks_ptr + kv_head * GROUP + pair % GROUP) * 1.4426950408889634
        total += 1.0
    acc = gl.zeros((ROWS, V_DIM), gl.float32, of_out)

    scores = warpgroup_mma_wait(0, deps=[_scores(qs, ks, k_ready, 0, of_scores)])
    mbarrier.arrive(k_free.index(0))
    found, best, total, _ = _softmax(scores, best, total, last * BLOCK_N, query_pos, qk_scale, window, True, HAS_WINDOW)
    weights = gl.convert_layout(found.to(qs.dtype), of_weights)
    if (last + 1) * BLOCK_N > num_keys:
        _clear(vs, v_ready, 0, last * BLOCK_N, 0, num_keys, V_DIM // 64, flat)
    masked = gl.minimum(gl.maximum(last + 1 - full, 1), count)
    if HAS_WINDOW:
        masked = count
    weights, best, total, acc = _visit(
        1, masked, weights, best, total, acc, qs, ks, vs, barriers, last, query_pos, qk_scale, window, True, HAS_WINDOW
    )
    weights, best, total, acc = _visit(
        masked, count, weights, best, total, acc, qs, ks, vs, barriers, last, query_pos, qk_scale, window, False, False
    )
    if HAS_WINDOW:
        _clear(vs, v_ready, count - 1, (last - count + 1) * BLOCK_N, low, num_keys, V_DIM // 64, flat)
    acc = warpgroup_mma_wait(0, deps=[_add_values(weights, vs, v_ready, count - 1, acc)])
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, of_out))[:, None]
    # Through this warpgroup's queries, which are no longer read.
    outs = qs._reinterpret(qs.dtype, [V_DIM // 64, ROWS, 64], qs.layout)
    qs._reinterpret(qs.dtype, [ROWS, V_DIM], qs.layout).store(acc.to(qs.dtype))
    at = out_ptr + (row * out_row + head * out_head)[:, None] + columns
    for chunk in gl.static_range(V_DIM // 64):
        gl.store(at + chunk * 64, outs.index(chunk).load(flat), mask=mine)
    if lse_ptr is not None:
        head, token = kv_head * GROUP + pair % GROUP, pair // GROUP
        lse = (best + gl.log2(total)) * 0.6931471805599453
        gl.store(lse_ptr + head * lse_head + first_token + token, lse, mask=token < query_len)


@quick
@gluon.jit(do_not_specialize=["table_row", "lse_head", "window"])
def _hopper_extend_kernel(
    q_ptr, k_desc, pe_desc, v_desc, out_ptr, lse_ptr, tables_ptr, cu_query_lens, key_lens, sinks_ptr,
    q_row, q_head, out_row, out_head, lse_head, table_row, k_rows, v_rows, k_head, v_head, qk_scale, window,
    GROUP: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: 128 (token, head) pairs of one request and kv head. key_lens: of paged keys, each request's number;
    of dense ones, where each request's start and the last's end."""
    kv_head = gl.program_id(0)
    request = gl.program_id(2)
    first_token = gl.load(cu_query_lens + request)
    query_len = gl.load(cu_query_lens + request + 1) - first_token
    # The last tiles see the most keys: they start first.
    first_pair = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    if first_pair >= query_len * GROUP:
        return
    num_keys = gl.load(key_lens + request)
    if tables_ptr is None:
        k_rows = num_keys
        v_rows = num_keys
        num_keys = gl.load(key_lens + request + 1) - num_keys
    # Tiles up to `last` are seen by some row, those below `full` by every row (without a window).
    last = (num_keys - 1) // BLOCK_N
    full = num_keys // BLOCK_N
    if CAUSAL:
        context = num_keys - query_len
        last = (context + gl.minimum((first_pair + 127) // GROUP, query_len - 1)) // BLOCK_N
        full = (context + first_pair // GROUP + 1) // BLOCK_N
    count = last + 1
    low = 0
    if HAS_WINDOW:
        low = gl.maximum(num_keys - query_len + first_pair // GROUP - window + 1, 0)
        count -= low // BLOCK_N

    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = k_desc.layout
    first_qs = gl.allocate_shared_memory(dtype, [K_DIM // 64, 64, 64], layout)
    second_qs = gl.allocate_shared_memory(dtype, [K_DIM // 64, 64, 64], layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES * (K_DIM // 64), BLOCK_N, 64], layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES * (V_DIM // 64), BLOCK_N, 64], layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    barriers = (k_ready, k_free, v_ready, v_free)
    strides = (q_row, q_head, out_row, out_head, lse_head)
    where = (kv_head, first_token, query_len, num_keys, last, count, full, low)
    # In a variable the tuples' constants would become values.
    gl.warp_specialize(
        [
            (_consume, (
                first_qs, first_pair, ks, vs, barriers, q_ptr, out_ptr, lse_ptr, sinks_ptr, strides, where,
                qk_scale, window, GROUP, V_DIM, CAUSAL, HAS_WINDOW,
            )),
            (_consume, (
                second_qs, first_pair + 64, ks, vs, barriers, q_ptr, out_ptr, lse_ptr, sinks_ptr, strides, where,
                qk_scale, window, GROUP, V_DIM, CAUSAL, HAS_WINDOW,
            )),
            (_produce, (
                k_desc, pe_desc, v_desc, ks, vs, barriers, tables_ptr, request.to(gl.int64) * table_row,
                num_keys, last, count, k_rows, v_rows, kv_head * k_head, kv_head * v_head, BLOCK_SIZE,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def can_extend(q: torch.Tensor, key_cache: torch.Tensor, max_query_len: int) -> bool:
    """Whether `hopper_extend` takes these queries and linear planes, and is faster: a tile must be half full."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    if q.dtype.itemsize != 2 or key_cache.dtype != q.dtype or head_dim not in (64, 128):
        return False
    power = block_size >= 8 and block_size & (block_size - 1) == 0
    return power and max_query_len * q.shape[1] >= _ROWS * num_kv_heads


def hopper_extend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_query_len: int,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_extend` over linear planes [num_blocks, block_size, num_kv_heads, head_dim], for what `can_extend`
    allows."""
    block_size = key_cache.shape[1]

    def described(plane: torch.Tensor) -> tuple[Any, int, int]:
        """Its tokens in the order of memory; rows of a block, columns of a head."""
        (blocks, _, heads, dim), (step, row, head, _) = plane.shape, plane.stride()
        rows = step // row
        return _described(plane, blocks * rows, heads, dim, row, head, min(block_size, _BLOCK_N)), rows, head

    keys, values = described(key_cache), described(value_cache)
    _launch(
        q, keys, None, values, out, None, block_tables, (cu_query_lens, seq_lens), sinks, max_query_len,
        scale=scale, window=window, causal=True, kv_heads=key_cache.shape[2], block_size=block_size,
    )  # fmt: skip
    return out


def can_attend_dense(q: torch.Tensor, k_nope: torch.Tensor, k_pe: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `hopper_dense` takes these."""
    dims = k_nope.shape[2], k_pe.shape[1], v.shape[2]
    aligned = all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(8 * (step // 8) == step for step in t.stride()[:-1])
        for t in (q, k_nope, k_pe, v)
    )
    return aligned and q.dtype.itemsize == 2 and dims == DENSE_DIMS


def hopper_dense(
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    v: torch.Tensor,
    cu_query_lens: torch.Tensor,
    cu_key_lens: torch.Tensor,
    max_query_len: int,
    *,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows of queries over rows of as many heads' dense keys, whose last columns all heads share.

    q [tokens, num_heads, nope + pe], k_nope [keys, num_heads, nope], k_pe [keys, pe], v [keys, num_heads, v_dim], row
    after row as cu_query_lens and cu_key_lens (int32 [rows + 1], device) say; each row has a key. causal: it has as
    many as queries, and query i sees keys 0 … i. Returns out [tokens, num_heads, v_dim], q's dtype, and lse float32
    [num_heads, tokens], natural.
    """
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)

    def described(dense: torch.Tensor) -> tuple[Any, int, int]:
        (keys, heads, dim), (row, head, _) = dense.shape, dense.stride()
        return _described(dense, keys, heads, dim, row, head, _BLOCK_N), 0, head

    pe = _described(k_pe, len(k_pe), 1, k_pe.shape[1], k_pe.stride(0), 0, _BLOCK_N)
    keys, values = described(k_nope), described(v)
    _launch(
        q, keys, pe, values, out, lse, None, (cu_query_lens, cu_key_lens), None,
        max_query_len, scale=scale, window=None, causal=causal, kv_heads=q.shape[1], block_size=_BLOCK_N,
    )  # fmt: skip
    return out, lse


def _described(memory: torch.Tensor, tokens: int, heads: int, dim: int, row: int, head: int, rows: int) -> Any:
    """[tokens, heads, dim] with steps row and head, of which `rows` and 64 columns are copied at a time."""
    return describe(memory, (tokens, (heads - 1) * head + dim), (row, 1), (rows, _CHUNK), _LAYOUT)


def _launch(
    q: torch.Tensor,
    keys: tuple[Any, int, int],
    pe: Any,
    values: tuple[Any, int, int],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    block_tables: torch.Tensor | None,
    lens: tuple[torch.Tensor, torch.Tensor],
    sinks: torch.Tensor | None,
    max_query_len: int,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    kv_heads: int,
    block_size: int,
) -> None:
    (k_desc, k_rows, k_head), (v_desc, v_rows, v_head) = keys, values
    requests, heads, k_dim, v_dim = len(lens[0]) - 1, q.shape[1], q.shape[2], out.shape[2]
    if requests == 0 or max_query_len == 0:
        return
    stage = (k_dim + v_dim) * _BLOCK_N * 2
    _hopper_extend_kernel[(kv_heads, cdiv(max_query_len * (heads // kv_heads), _ROWS * _GROUPS), requests)](
        q, k_desc, pe, v_desc, out, lse, block_tables, *lens, sinks, *q.stride()[:2], *out.stride()[:2],
        0 if lse is None else lse.stride(0), 0 if block_tables is None else block_tables.stride(0),
        k_rows, v_rows, k_head, v_head, scale * LOG2E, window or 0,
        GROUP=heads // kv_heads, K_DIM=k_dim, V_DIM=v_dim, BLOCK_N=_BLOCK_N,
        STAGES=min(_MOST_STAGES, (_SHARED_BYTES - _ROWS * _GROUPS * k_dim * 2) // stage), BLOCK_SIZE=block_size,
        CAUSAL=causal, HAS_WINDOW=window is not None, REGISTERS=_REGISTERS, PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        num_warps=4,
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """Attend once. Raises RuntimeError if the result is wrong, and whatever Triton raises if it cannot compile the
    kernel."""
    context, new, window = 40, 17, 9
    value = torch.arange(64, dtype=torch.float16, device=device)
    value[: context - window + 1] = value[context + new :] = float("nan")  # keys that no query sees
    value = value[:, None].repeat(1, 64).view(4, 16, 1, 64)
    q = torch.zeros(new, 1, 64, dtype=value.dtype, device=device)
    lens = ([[0, 1, 2, 3]], [0, new], [context + new])
    tables, starts, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in lens)
    out = hopper_extend(
        q, value, value, tables, starts, ends, max_query_len=new, scale=1.0, out=torch.empty_like(q), window=window
    )
    middle = torch.arange(context, context + new, device=device) - window // 2
    if not torch.equal(out, q + middle.to(q.dtype)[:, None, None]):
        raise RuntimeError("queries that weigh all keys alike do not get the mean of their values")
