"""What backends allocate beside the cache is what the memory plan was told."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attention_steps import make_step
from engine_support import stand_in

from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.build import block_bytes, pool_limit, scratch_bytes
from miniserve.attention.backends.rocm_attn import RocmBackend
from miniserve.attention.backends.rocm_base import AsmScales, PagedScratch
from miniserve.attention.backends.triton_mla import TritonLatentBackend
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims

MI300X = NAMED_PLATFORMS["mi300x"]
SPEC = AttentionSpec(16, 2, 128, 128**-0.5, torch.bfloat16, torch.bfloat16)
WIDE = replace(SPEC, num_heads=10, head_dim=256, scale=1 / 16)


@pytest.mark.parametrize(("rows", "longest", "partitions"), [(8, 600, 3), (3, 256, 1), (1, 257, 2)])
def test_the_paged_kernels_scratch(rows: int, longest: int, partitions: int) -> None:
    options = BackendOptions(
        specs=(SPEC, WIDE),
        routes=(),
        platform=MI300X,
        device=torch.device("cpu"),
        max_rows=rows,
        max_seq_len=longest,
    )
    scratch = PagedScratch(options)
    assert scratch.workspace.nbytes == RocmBackend.scratch_bytes("shuffled", options)
    for spec in (SPEC, WIDE):
        q = torch.empty(rows, spec.num_heads, spec.head_dim, dtype=torch.bfloat16)
        sums, logits, values = scratch.parts(q, longest)
        shape = (rows, spec.num_heads, partitions)
        assert (sums.shape, logits.shape, values.shape) == (shape, shape, (*shape, spec.head_dim))
        assert (sums.dtype, logits.dtype, values.dtype) == (torch.float32, torch.float32, torch.bfloat16)
        places = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (sums, logits, values)]
        assert all(end <= start for (_, end), (start, _) in pairwise(places)), "they overlap"
        assert places[-1][1] <= scratch.workspace.data_ptr() + scratch.workspace.nbytes


def test_only_the_backends_that_allocate_are_charged() -> None:
    charged = {}
    for backend in ("ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "TRITON_ATTN"):
        choice = select([SPEC], MI300X, block_size=16, backend=backend)
        charged[backend] = scratch_bytes(choice, 256, 4096)
    assert charged["ROCM_ATTN"] == 256 * 16 * 16 * (8 + 2 * 128)
    assert charged["ROCM_AITER_FA"] == charged["ROCM_ATTN"] + 32768 * 2 * 128 * 4
    assert charged["ROCM_AITER_UNIFIED_ATTN"] == charged["TRITON_ATTN"] == 0


@pytest.mark.parametrize("gpu", ["h100", "mi300x"])
@pytest.mark.parametrize(("heads", "max_seq_len"), [(16, 4096), (128, 163840), (16, 1)])
def test_the_splits_of_latent_rows_are_charged(gpu: str, heads: int, max_seq_len: int) -> None:
    pytest.importorskip("miniserve.kernels.triton.split_kv")
    spec = AttentionSpec(heads, 1, 576, 0.1, torch.bfloat16, torch.bfloat16, latent=LatentDims(512, 64, 128, 128))
    platform, specs = NAMED_PLATFORMS[gpu], (spec, replace(spec, scale=0.2), spec)
    choice = select(specs, platform, block_size=16, backend="TRITON_MLA")
    backend = TritonLatentBackend(choice.kv_layout, choice.options(torch.device("cpu"), 64, max_seq_len))
    parts = [(s.partial, s.lse, s.arrivals) for s in backend._scratch.values()]
    assert len(parts) == 2, "layers of a kind share theirs"
    allocated = sum(tensor.nbytes for tensors in parts for tensor in tensors)
    assert scratch_bytes(choice, 64, max_seq_len) == allocated
    assert (allocated > 1 << 20) == (max_seq_len > 1)


def test_the_asm_kernel_s_scales_are_charged_by_the_block() -> None:
    spec = replace(SPEC, kv_dtype=MI300X.fp8_dtype)
    choice = select([spec], MI300X, block_size=16, backend="ROCM_AITER_FA", layout="shuffled")
    with stand_in("gfx942", 4) as module:
        assert module.dtypes.fp8 == spec.kv_dtype
        step = make_step((spec, 16, [(20, 1)], 1), "shuffled", 0, (0.5, 0.25))
        tables = AsmScales(16).of(step.layer, step.cache)
    num_blocks = step.cache.key.shape[0]
    taken = sum(table.nbytes for table in tables if table is not None)
    assert block_bytes(choice) * num_blocks == step.cache.key.nbytes + step.cache.value.nbytes + taken


def test_a_pool_is_as_large_as_its_decode_kernels_reach() -> None:
    mla = AttentionSpec(16, 1, 576, 0.1, torch.bfloat16, torch.bfloat16, latent=LatentDims(512, 64, 128, 128))
    wide = replace(SPEC, num_heads=64, num_kv_heads=8)
    for spec, backend, gpu, most in (
        (mla, "ROCM_AITER_MLA", "mi300x", (4 << 30) // (16 * 576 * 2)),
        (mla, "ROCM_AITER_MLA", "mi355x", None),
        (mla, "TRITON_MLA", "mi300x", None),
        (wide, "ROCM_AITER_FA", "mi300x", (4 << 30) // (16 * 8 * 128 * 2)),
        (wide, "ROCM_AITER_FA", "mi355x", (4 << 30) // (16 * 8 * 128 * 2)),
        (wide, "ROCM_ATTN", "mi300x", None),
    ):
        for fp8 in (False, True):
            platform = NAMED_PLATFORMS[gpu]
            each = replace(spec, kv_dtype=platform.fp8_dtype) if fp8 else spec
            layout_name = "latent" if spec is mla else "shuffled"
            choice = select([each], platform, block_size=16, backend=backend, layout=layout_name)
            found = pool_limit(choice, 256)
            if backend == "ROCM_AITER_MLA" and fp8:  # over which both GPUs' kernels have 32 bits
                most = (4 << 30) // (16 * 576)
            assert (None if found is None else found.num_blocks) == (
                None if backend == "ROCM_AITER_FA" and fp8 else most
            )
    choice = select([wide], MI300X, block_size=16, backend="ROCM_AITER_FA", layout="shuffled")
    assert pool_limit(choice, 9) is None, "9 rows never reach ASM"
