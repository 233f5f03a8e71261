"""What each kernel and each backend takes, as data. `select` reads these tables; nothing else decides what can be done.

The terms of aiter's kernels are those of v0.1.20.post1: its source, its validators and its issue tracker.
"""

from __future__ import annotations

from functools import partial

import torch

from miniserve.attention.terms import BackendContract, KernelContract, Sizes

_ALL = (torch.bfloat16, torch.float16, torch.float32)
_HALF = (torch.bfloat16, torch.float16)
_BOTH = ("linear", "shuffled")
_ASM_FP8_TOLERANCE = 6e-2  # assembly may round queries or weights to fp8 too
_PAGED_DIMS = Sizes(
    only=(64, 128, 256)
)  # aiter's HIP kernels drop what is left of head_dim / 64, and return garbage below 64

_aiter = partial(KernelContract, dtypes=_HALF, fp8_kv=True)
# aiter's decode kernels take several query tokens a row, too, but not rightly: see each.
_decode = partial(_aiter, one_query=True)
_plain = partial(_decode, min_window=None, softcap=False, sinks=False)

_CPU = KernelContract(name="CPU_ATTN", layouts=_BOTH, dtypes=_ALL)
_TORCH = KernelContract(name="TORCH_ATTN", layouts=_BOTH, dtypes=_ALL, fp8_kv=True, any_kv=True)
_TORCH_MLA = KernelContract(name="TORCH_MLA", layouts=("latent",), dtypes=_ALL, fp8_kv=True, any_kv=True)
_TRITON_MLA = KernelContract(name="TRITON_MLA", layouts=("latent",), dtypes=_ALL, fp8_kv=True, head_dim=Sizes(most=576))
_TRITON_DECODE, _TRITON_EXTEND = (
    KernelContract(
        name=name, layouts=_BOTH, dtypes=_ALL, fp8_kv=True, head_dim=Sizes(least=16, most=256), one_query=one_query
    )
    for name, one_query in (("triton paged_decode", True), ("triton paged_extend", False))
)
_PAGED_V1 = _decode(  # skips rows of several query tokens
    name="paged_attention_v1",
    layouts=("linear",),
    head_dim=_PAGED_DIMS,
    max_group=16,
    block_size=Sizes(only=(16, 32)),
    sinks=False,
    fp8_products=True,
)
_PAGED_ROCM = _plain(
    name="paged_attention_rocm",
    layouts=("shuffled",),
    head_dim=_PAGED_DIMS,
    max_group=16,  # above it the kernel's head index is wrong
    block_size=Sizes(multiple=16),
    fp8_products=True,
)
# Reaches the ASM kernel from some batch on, so it has that kernel's terms at any batch. Its HIP kernel computes one
# query token a row whatever it is told; the ASM one is silently wrong with several over an fp8 cache and more than 8
# query heads per KV head (seen on hardware: ROCm/ATOM #2211).
_PAGED_COMMON = _plain(
    name="paged_attention_common",
    layouts=("shuffled",),
    head_dim=Sizes(only=(128,)),
    max_group=16,
    block_size=Sizes(only=(16,)),
    any_scale=False,
    fp8_products=True,
    fp8_tolerance=_ASM_FP8_TOLERANCE,
    narrow_offsets=(("gfx*", 2),),
)
# Several query tokens it takes only if every row has as many (vllm #52849), and a window then counts otherwise.
_GLUON = _decode(
    name="pa_decode_gluon",
    layouts=("shuffled",),
    head_dim=_PAGED_DIMS,
    max_group=64,
    block_size=Sizes(only=(16, 64)),
    softcap=False,
)
_UNIFIED, _UNIFIED_SHUFFLED = (
    _aiter(
        name="unified_attention",
        layouts=(layout,),
        head_dim=Sizes(least=32, most=256, pow2=pow2),  # shuffled, others than powers of two give NaN
        block_size=Sizes(multiple=16, pow2=True),
        # AMD's own build of 3.7 aborts over its software pipeline, which no version of aiter leaves out (aiter #4517,
        # not merged); 3.6.0, 3.7.0 and 3.8.0 as on PyPI compile it.
        crashes=(("gfx950", "3.7.*+amd*"),),
    )
    for layout, pow2 in (("linear", False), ("shuffled", True))
)
# Keys and values come dense, gathered from the cache where there is context. Sinks: its ASM variant drops them. A
# window of 1 is told as (0, 0), which it takes for none.
_FLASH = _aiter(
    name="flash_attn_varlen_func", layouts=_BOTH, head_dim=Sizes(multiple=8, most=256), min_window=2, sinks=False
)
# Two turn and store in one launch, the engine's own norms, too; rope goes before the third. aiter's stores what it
# turned unrounded. With each of them what an fp8 cache cannot hold becomes its largest code. With aiter's HIP writers
# (`reshape_and_cache`, `reshape_and_cache_flash`, `concat_and_cache_mla`) it becomes NaN, so none of these serves.
_FUSED_ROPE_WRITE = KernelContract(
    name="fused_qk_rope_reshape_and_cache",
    layouts=_BOTH,
    dtypes=(torch.bfloat16,),
    fp8_kv=True,
    head_dim=Sizes(least=16, pow2=True),
    block_size=Sizes(pow2=True),
    qk_norm=False,
    partial_rope=False,
)
_ROPE_AND_WRITE = KernelContract(
    name="triton rope_and_write", layouts=_BOTH, dtypes=_ALL, fp8_kv=True, partial_rope=False
)
_TRITON_WRITE = KernelContract(name="triton write_kv", layouts=_BOTH, dtypes=_ALL, fp8_kv=True)
# Query heads that the persistent kernels take with one query token a row, natively or folded to 16 heads a row, on
# gfx942 and gfx950, from bfloat16 queries over a cache of bfloat16 or fp8 (aiter's asm_mla.cu and mla_asm.csv). Of more
# than 4 tokens gfx942 has no persistent kernel, and those that are not persistent are wrong (aiter #5679).
MLA_HEADS = tuple(range(16, 129, 16))
_AITER_MLA = _plain(
    name="mla_decode_fwd",
    layouts=("latent",),
    dtypes=(torch.bfloat16,),
    heads=MLA_HEADS,
    latent_parts=(512, 64),
    fp8_tolerance=_ASM_FP8_TOLERANCE,
    narrow_offsets=(("gfx942", 2), ("gfx*", 1)),
)
_FLASH_LATENT = _plain(name="flash_attn_varlen_func", layouts=("latent",), max_dense_dim=256, one_query=False)

_INSTINCT = ("gfx942", "gfx950")
_UNIFIED_BOTH = (_UNIFIED, _UNIFIED_SHUFFLED)
_OWN_WRITE = (_ROPE_AND_WRITE, _TRITON_WRITE)
_AITER_WRITE = (_FUSED_ROPE_WRITE, *_OWN_WRITE)
_rocm = partial(BackendContract, archs=_INSTINCT, requires=("aiter", "triton"))
# In order of preference. Those of latent attention come last, where models without it never get to.
CONTRACTS = (
    _rocm(
        name="ROCM_ATTN",
        implementation="rocm_attn:RocmBackend",
        layouts=("shuffled",),
        decode=(_PAGED_ROCM,),
        rerouted_decode=(_TRITON_DECODE,),
        chunks=(_TRITON_EXTEND,),
        write=_OWN_WRITE,
    ),
    _rocm(
        name="ROCM_AITER_FA",
        implementation="rocm_aiter_fa:FlashBackend",
        layouts=_BOTH,
        decode=(_PAGED_V1, _PAGED_COMMON, _PAGED_ROCM),
        rerouted_decode=_UNIFIED_BOTH,
        chunks=(_FLASH, *_UNIFIED_BOTH),
        write=_AITER_WRITE,
    ),
    _rocm(
        name="ROCM_AITER_UNIFIED_ATTN",
        implementation="rocm_unified:UnifiedBackend",
        layouts=_BOTH,
        decode=_UNIFIED_BOTH,
        chunks=_UNIFIED_BOTH,
        write=_AITER_WRITE,
    ),
    # After the one that serves all it serves: it is taken where it was measured to be faster, or asked for.
    _rocm(
        name="ROCM_AITER_GLUON",
        implementation="rocm_gluon:GluonBackend",
        layouts=("shuffled",),
        decode=(_GLUON,),
        rerouted_decode=(_UNIFIED_SHUFFLED,),
        chunks=(_UNIFIED_SHUFFLED,),
        write=_AITER_WRITE,
        min_aiter=(0, 1, 20),  # of how it counts a window's keys no earlier version was read
    ),
    BackendContract(
        name="TRITON_ATTN",
        implementation="triton_attn:TritonBackend",
        layouts=_BOTH,
        decode=(_TRITON_DECODE,),
        chunks=(_TRITON_EXTEND,),
        write=_OWN_WRITE,
        archs=("sm_80+", "gfx*"),
        fp8_archs=("sm_89+", "gfx942", "gfx950", "gfx12*"),
        requires=("triton",),
    ),
    BackendContract(
        name="CPU_ATTN",
        implementation="cpu_attn:CpuBackend",
        layouts=_BOTH,
        decode=(_CPU,),
        chunks=(_CPU,),
        archs=("cpu",),
        requires=("native",),
    ),
    BackendContract(
        name="TORCH_ATTN", implementation="torch_attn:TorchBackend", layouts=_BOTH, decode=(_TORCH,), chunks=(_TORCH,)
    ),
    _rocm(
        name="ROCM_AITER_MLA",
        implementation="rocm_aiter_mla:AiterLatentBackend",
        layouts=("latent",),
        decode=(_AITER_MLA,),
        chunks=(_FLASH_LATENT,),
        min_aiter=(0, 1, 20),  # of the planning kernel's arguments no earlier version was read
    ),
    BackendContract(
        name="TRITON_MLA",
        implementation="triton_mla:TritonLatentBackend",
        layouts=("latent",),
        decode=(_TRITON_MLA,),
        chunks=(_TRITON_MLA,),
        archs=("sm_90", "sm_100", "sm_103", *_INSTINCT),  # other NVIDIA GPUs' shared memory is below its tiles' 184 KB
        requires=("triton",),
    ),
    BackendContract(
        name="TORCH_MLA",
        implementation="torch_mla:TorchLatentBackend",
        layouts=("latent",),
        decode=(_TORCH_MLA,),
        chunks=(_TORCH_MLA,),
    ),
)
# By name: contracts of the same name differ in the layouts and sizes that they take, and in nothing else.
KERNELS = {
    kernel.name: kernel
    for backend in CONTRACTS
    for kernel in (*backend.decode, *backend.rerouted_decode, *backend.chunks)
}
