"""`pa_fwd_asm`: the hand-written decode kernel over shuffled caches."""

from __future__ import annotations

from functools import cache

import torch

from aiter import _checks, _math, _standin
from aiter._standin import check, record, require

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8", torch.uint8: "int8"}
_TILE = 256  # context tokens of one pass of the kernel's loop


@cache
def kernels(arch: str) -> set[tuple[str, str, int, int, int, int, int]]:
    """(q, kv, gqa, mtp, msk, hp, block_size) of the non-persistent rows of `hsa/<arch>/pa/pa_asm.csv`."""
    rows = set()
    for q in ("bf16", "fp16"):
        rows |= {(q, q, 8, mtp, msk, 0, 16) for mtp, msk in ((0, 0), (1, 0), (1, 1))} | {(q, q, 16, 0, 0, 0, 16)}
        for gqa in (8, 16):
            rows |= {(q, kv, gqa, m, s, 0, 16) for kv in ("fp8", "int8") for m, s in ((0, 0), (1, 0), (1, 1))}
        rows |= {(q, "fp8", 8, 0, 0, hp, 16) for hp in (1, 2)}
    if arch == "gfx942":
        rows |= {("bf16", "fp8", 10, mtp, int(mtp > 0), 0, 1024) for mtp in (0, 12, 13, 14)}
    return rows


def _candidates(q: str, kv: str, gqa: int, hp: int, block_size: int) -> list[int]:
    """The precisions of the kernels that may be picked (with high_precision 1 any may: hash order); one-query calls."""
    for rounded in (gqa, (gqa + 7) // 8 * 8):
        rows = [row for row in kernels(_standin.device.arch) if row[:5] == (q, kv, rounded, 0, 0)]
        found = [row[5] for row in rows if row[6] == block_size and (row[5] == hp or hp == 1)]
        if found:
            return found
    raise RuntimeError(
        f"get_heuristic_kernel: cannot get heuristic kernel! q_type:{q} kv_type:{kv} gqa:{gqa} mtp:0 msk:0 hp:{hp} "
        f"block_size:{block_size} ps:0 qTile:0 quant_type:0"
    )


def pa_fwd_asm(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables_stride0: int,
    max_qlen: int = 1,
    K_QScale: torch.Tensor | None = None,
    V_QScale: torch.Tensor | None = None,
    out_: torch.Tensor | None = None,
    qo_indptr: torch.Tensor | None = None,
    high_precision: int | None = 1,
    kernelName: str | None = None,
) -> torch.Tensor:
    """Always scales by 1/sqrt(128). Reproduced: a context of 241…255 counts its first tile once unmasked, stale slots
    included, and once masked (quantised with GQA > 8: NaN); one query over quantised KV through a kernel of precision 0
    gives 0 (aiter's op_tests/test_pa_block_id_truncation.py), also where hash order may pick that kernel: only fp8 with
    GQA <= 8 and high_precision 2 escapes it; 16-bit blocks beyond 4 GiB are read as others. A 4-D V, one scale table of
    two, quantised KV without tables, several queries, and before v0.1.17 a block beyond 2 GiB are violations.
    """
    record("pa_fwd_asm", "asm")
    heads, head_dim = Q.shape[1:]
    check(head_dim == 128, f"pa_fwd: ASM PA only supports head_size=128, got {head_dim}")
    fp8 = _standin.device.fp8
    check(Q.dtype in (torch.bfloat16, torch.float16), f"pa_fwd: unsupport Q dtype:{Q.dtype}")
    check(K.dtype in _NAMES or K.dtype == fp8, f"pa_fwd: unsupport K dtype:{K.dtype}")
    num_blocks, kv_heads, _, block_size, _ = K.shape
    hp = high_precision if high_precision in (1, 2) else 0
    quantised = K.element_size() == 1
    kind = _NAMES.get(K.dtype, "fp8")
    require(max_qlen == 1 and kernelName is None, "pa_fwd_asm: the stand-in covers one query and no named kernel")
    precisions = _candidates(_NAMES[Q.dtype], kind, heads // kv_heads, hp, block_size)
    require(V.dim() == 5, f"pa_fwd_asm reads V as [NB, KH, BS/x, D, x], not {tuple(V.shape)}")
    _checks.packed_shapes(K, V, head_dim)
    batch = context_lens.shape[0]
    require(Q.shape[0] >= batch, f"pa_fwd_asm: {Q.shape[0]} query rows for {batch} sequences")
    require(block_tables_stride0 == block_tables.stride(0), "pa_fwd_asm: block_tables_stride0 is not the table's")
    _checks.paging(block_tables, context_lens, block_size, num_blocks, block_tables.shape[1] * block_size)
    _checks.dense_rows("Q", Q)
    out = out_ if out_ is not None else torch.empty_like(Q)
    _checks.tensor("out_", out, Q.dtype, tuple(Q.shape))
    require((K_QScale is None) == (V_QScale is None), "pa_fwd_asm: scale tables for both or for neither")
    require(K_QScale is not None or not quantised, "pa_fwd_asm: quantised KV needs both scale tables (null is read)")
    for name, table in (("K_QScale", K_QScale), ("V_QScale", V_QScale)):
        if table is not None:
            _checks.tensor(name, table, torch.float32, (num_blocks, kv_heads, block_size))
    ids = block_tables[:, : -(-int(context_lens.max()) // block_size)] if batch else block_tables
    old = not _standin.device.at_least("0.1.17")
    reach = int(ids.max()) * K.stride(0) * K.element_size() if ids.numel() else 0
    require(not old or reach < 2**31, "pa_fwd_asm before v0.1.17: a block 2 GiB or more into the plane is misread")
    ids = ids if quantised else _math.wrapped(ids, K.stride(0) * K.element_size())
    k, v = _math.packed_key(K, ids), _math.packed_value(V, ids)
    if quantised:
        k, v = (t * s[ids.long()].transpose(2, 3).flatten(1, 2)[..., None] for t, s in ((k, K_QScale), (v, V_QScale)))
    lens = context_lens.long()
    twice = (
        (lens >= 241) & (lens <= 255) if _standin.device.tile_bug and block_size == 16 else torch.zeros_like(lens) > 0
    )
    j = torch.arange(k.shape[1])
    counts = (j < lens[:, None]).long() + (twice[:, None] & (j < _TILE)).long()
    got, _ = _math.attention(Q[:batch, None], k, v, lens[:, None] - 1, lens, 128**-0.5, counts=counts)
    got = got[:, 0]
    got[lens == 0] = float("nan")
    if quantised and 0 in precisions:
        got[lens > 0] = 0.0
    if quantised and heads // kv_heads > 8:
        got[twice] = float("nan")
    _math.poison(out)
    out[:batch] = got.to(out.dtype)
    return out
