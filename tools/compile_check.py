"""`python -m tools.compile_check`: compile everything the engine can launch, without the GPUs.

Every case calls a kernel's wrapper on tensors without storage, with Triton's driver replaced by the name of an
architecture, so that it compiles what would be launched. The compiled code shows registers, spills, shared memory and
an estimate of the occupancy. A spilled vector register on AMD fails, as does more shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from miniserve.kernels.triton import (
    cache_write,
    hopper_extend,
    hopper_mla,
    linearize,
    mla_decode,
    paged_decode,
    paged_extend,
    token_indices,
)
from miniserve.kernels.triton.launch import Launch, decode_launch
from miniserve.kernels.triton.small_linear import Chip
from miniserve.kernels.triton.split_kv import DecodeScratch
from tools.compile_step import (
    META,
    Case,
    int32,
    large_launches,
    medium_launches,
    scaled_launches,
    step_launches,
    tensor,
)

ROWS, NUM_BLOCKS, TABLE_WIDTH, KV_HEADS = 64, 1 << 20, 4096, 8  # planes of many GiB: 64-bit offsets
SPLITS = (1, 2, 64)  # no merge, a merge by the last split to arrive, a merge by a separate kernel (AMD: always that)


@dataclass(frozen=True, slots=True)
class Arch:
    """shared_per_core: bytes of shared memory that the programs of a compute unit or multiprocessor have together."""

    target: GPUTarget
    fp8: torch.dtype
    chip: Chip
    shared_per_core: int


ARCHS = {
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), torch.float8_e4m3fnuz, Chip(304, 64 << 10, splits=False), 64 << 10),
    "gfx950": Arch(GPUTarget("hip", "gfx950", 64), torch.float8_e4m3fn, Chip(256, 160 << 10, splits=False), 160 << 10),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), torch.float8_e4m3fn, Chip(132, 227 << 10, wgmma=True), 228 << 10),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """The compiler's report on one kernel. agprs: registers that only results of the matrix unit may use (AMD);
    occupancy: waves per SIMD (AMD) or programs per multiprocessor (NVIDIA)."""

    arch: str
    kernel: str
    case: str
    warps: int
    registers: int
    agprs: int
    spills: int
    shared: int
    occupancy: int

    @property
    def problem(self) -> str | None:
        if self.spills and ARCHS[self.arch].target.backend == "hip":
            return f"spills {self.spills} vector registers"
        if self.shared > ARCHS[self.arch].chip.shared_bytes:
            return f"needs {self.shared} bytes of shared memory, of {ARCHS[self.arch].chip.shared_bytes}"
        return None


def _planes(kv_dtype: torch.dtype, block_size: int, head_dim: int, shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = 16 // kv_dtype.itemsize
    key: tuple[int, ...] = (NUM_BLOCKS, block_size, KV_HEADS, head_dim)
    value = key
    if shuffled:
        key = (NUM_BLOCKS, KV_HEADS, head_dim // x, block_size, x)
        value = (NUM_BLOCKS, KV_HEADS, block_size // x, head_dim, x)
    return tensor(*key, dtype=kv_dtype), tensor(*value, dtype=kv_dtype)


def _scale(kv_dtype: torch.dtype) -> torch.Tensor | None:
    return tensor(1, dtype=torch.float32) if kv_dtype.itemsize == 1 else None


def _attention(
    kv: torch.dtype, head_dim: int, shuffled: bool, *, dtype: torch.dtype = torch.bfloat16, group: int = 4,
    block_size: int = 16, num_splits: int = 1, special: bool = False, query_len: int = 0, rows: int = ROWS,
    tile: Launch | None = None,
) -> Case:  # fmt: skip
    """query_len: of prefill; else decode."""
    heads = group * KV_HEADS
    terms: dict[str, Any] = {"num_kv_heads": KV_HEADS, "block_size": block_size, "shuffled": shuffled, "scale": 0.1}
    terms |= {"num_splits": num_splits, "k_scale": _scale(kv), "v_scale": _scale(kv)}
    if special:
        terms |= {"window": 1024, "softcap": 30.0, "sinks": tensor(heads, dtype=torch.float32)}
    q = tensor(rows * (query_len or 1), heads, head_dim, dtype=dtype)
    common = q, *_planes(kv, block_size, head_dim, shuffled), int32(rows, TABLE_WIDTH)

    def launch() -> None:
        if query_len:
            paged_extend.paged_extend(*common, int32(rows + 1), int32(rows), max_query_len=query_len, **terms)
        else:
            scratch = DecodeScratch.allocate([(rows, num_splits)], heads, head_dim, META)
            paged_decode.paged_decode(*common, int32(rows), fresh=1, scratch=scratch, launch=tile, **terms)

    what = f"{_what(dtype, kv, shuffled, block_size)} d{head_dim} gqa{group}" + (f" q{query_len}" if query_len else "")
    what += f" {rows} rows" if rows != ROWS else ""
    return what + _merge(num_splits) + (", window + softcap + sinks" if special else ""), launch


_prefill = partial(_attention, query_len=2048)


def _hopper_extend(dtype: torch.dtype, head_dim: int, group: int, block_size: int, *, special: bool = False) -> Case:
    q = tensor(ROWS * 2048, group * KV_HEADS, head_dim, dtype=dtype)
    planes = _planes(dtype, block_size, head_dim, False)
    terms: dict[str, Any] = {"window": 1024, "sinks": tensor(q.shape[1], dtype=torch.float32)} if special else {}
    lens = int32(ROWS, TABLE_WIDTH), int32(ROWS + 1), int32(ROWS)
    launch = partial(
        hopper_extend.hopper_extend, q, *planes, *lens, max_query_len=2048, scale=0.1, out=tensor(*q.shape), **terms
    )
    more = ", window + sinks" if special else ""
    return f"{_what(dtype, dtype, False, block_size)} d{head_dim} gqa{group} q2048{more}", launch


def _hopper_dense(causal: bool) -> Case:
    kv, k_pe = tensor(8192, 16, 256), tensor(8192, 576)[:, 512:]
    launch = partial(
        hopper_extend.hopper_dense, tensor(8192, 16, 192), kv[..., :128], k_pe, kv[..., 128:], int32(5), int32(5), 4096,
        scale=0.1, causal=causal,
    )  # fmt: skip
    return f"bf16 dense d192 and 128{', causal' if causal else ''}", launch


def _linearize(kv: torch.dtype, head_dim: int) -> Case:
    lens = int32(ROWS, TABLE_WIDTH), int32(ROWS + 1), int32(ROWS)
    return f"{_NAMES[kv]} block 16 d{head_dim}", partial(linearize.linearize, *_planes(kv, 16, head_dim, True), *lens)


def _mla(kv: torch.dtype, heads: int, num_splits: int) -> Case:
    q, q_pe = tensor(ROWS, heads, 512), tensor(ROWS, heads, 192)[..., 128:]
    cache = tensor(NUM_BLOCKS, 16, 576, dtype=kv)
    launch = partial(
        mla_decode.mla_decode, q, q_pe, cache, int32(ROWS, TABLE_WIDTH), int32(ROWS), scale=0.1, num_splits=num_splits,
        kv_scale=_scale(kv), scratch=DecodeScratch.allocate([(ROWS, num_splits)], heads, 512, META), fresh=1,
    )  # fmt: skip
    return f"bf16/{_NAMES[kv]} block 16 {heads} heads{_merge(num_splits)}", launch


def _hopper_mla(heads: int, num_splits: int, block_size: int = 16) -> Case:
    q, q_pe = tensor(ROWS, heads, 512), tensor(ROWS, heads, 192)[..., 128:]
    cache, scratch = tensor(NUM_BLOCKS, block_size, 576), DecodeScratch.allocate([(ROWS, num_splits)], heads, 512, META)
    launch = partial(
        hopper_mla.hopper_mla, q, q_pe, cache, int32(ROWS, TABLE_WIDTH), int32(ROWS), scale=0.1, num_splits=num_splits,
        fresh=1, scratch=scratch,
    )  # fmt: skip
    return f"bf16 block {block_size} {heads} heads{_merge(num_splits)}", launch


def _write(kv: torch.dtype, head_dim: int, shuffled: bool, normed: bool, keeps_k: bool = False) -> Case:
    qkv, slots = tensor(ROWS, 48 * head_dim), tensor(ROWS, dtype=torch.int64)
    planes, norm = _planes(kv, 16, head_dim, shuffled), tensor(head_dim) if normed else None
    where: dict[str, Any] = {"block_size": 16, "shuffled": shuffled, "k_scale": _scale(kv), "v_scale": _scale(kv)}

    def launch() -> None:
        heads = qkv.view(ROWS, 48, head_dim)
        cache_write.write_kv(heads[:, 32:40], heads[:, 40:], *planes, slots, **where)
        cache_write.rope_and_write(
            qkv, tensor(ROWS, head_dim, dtype=torch.float32), norm, norm, 1e-6, *planes, slots, num_heads=32,
            num_kv_heads=KV_HEADS, head_dim=head_dim, k_out=tensor(ROWS, KV_HEADS, head_dim) if keeps_k else None,
            **where,
        )  # fmt: skip

    more = (", qk-norm" if normed else "") + (", k kept" if keeps_k else "")
    return f"{_what(torch.bfloat16, kv, shuffled, 16)} d{head_dim}{more}", launch


def _write_latent(kv: torch.dtype, tokens: int = ROWS) -> Case:
    cache, slots, q = tensor(NUM_BLOCKS, 16, 576, dtype=kv), tensor(tokens, dtype=torch.int64), tensor(tokens, 16, 192)
    latent, k, norm = tensor(tokens, 512), tensor(tokens, 64), (tensor(512), 1e-6)

    def launch() -> None:
        if tokens == ROWS:
            cache_write.write_latent(latent, k, cache, slots, kv_scale=_scale(kv))
        cache_write.norm_rope_latent(
            q[:, :, 128:], latent, k, *norm, tensor(tokens, 64, dtype=torch.float32), interleaved=True, kv_cache=cache,
            slot_mapping=slots, kv_scale=_scale(kv), settled=True,
        )  # fmt: skip

    return f"bf16/{_NAMES[kv]}, {tokens} tokens", launch


def _token_indices() -> Case:
    tables, lens, starts, out = int32(ROWS, TABLE_WIDTH), int32(ROWS), int32(ROWS + 1), int32(NUM_BLOCKS)
    sizes = {"block_size": 16, "max_seq_len": 1 << 16}
    return "block 16", partial(token_indices.token_indices, tables, lens, starts, out, **sizes)


_QUICK = (
    "fp8 64 rows 4096 x 12288, blocks", "fp8 16 rows 12288 x 4096, rows gated", "fp8 1 tokens, 8 of 128 of 1536",
    "fp8 4096 tokens, 8 of 128 of 1536, rounded",
)  # fmt: skip
_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e4m3fnuz: "fp8",
}


def _what(dtype: torch.dtype, kv: torch.dtype, shuffled: bool, block_size: int) -> str:
    return f"{_NAMES[dtype]}/{_NAMES[kv]} {'shuffled' if shuffled else 'linear'} block {block_size}"


def _merge(num_splits: int) -> str:
    return "" if num_splits == 1 else f", {num_splits} splits"


def cases(arch: Arch) -> Iterator[Case]:
    """Each launch that differs in generated code."""
    half, single, fp8 = torch.bfloat16, torch.float32, arch.fp8
    yield from step_launches(arch.chip)
    yield from scaled_launches(arch.chip, arch.fp8)
    for shuffled in (False, True):
        for kv in (half, fp8):
            for head_dim in (64, 80, 96, 112, 128, 192, 256):
                yield from (_attention(kv, head_dim, shuffled, num_splits=splits) for splits in SPLITS)
                yield from (_attention(kv, head_dim, shuffled, query_len=tokens) for tokens in (2048, 4))
            for group in (1, 16, 32, 64):
                yield from (_attention(kv, 128, shuffled, group=group, num_splits=splits) for splits in SPLITS)
            yield from (_attention(kv, 128, shuffled, block_size=block_size) for block_size in (32, 64))
            for head_dim in (64, 128, 256):
                yield _attention(kv, head_dim, shuffled, special=True, num_splits=8)
                yield _prefill(kv, head_dim, shuffled, special=True)
            yield from (_write(kv, 128, shuffled, normed) for normed in (False, True))
            yield _write(kv, 128, shuffled, normed=True, keeps_k=True)
        for head_dim in (64, 128, 256):
            for dtype in (torch.float16, single):
                yield _attention(dtype, head_dim, shuffled, dtype=dtype)
                yield _prefill(dtype, head_dim, shuffled, dtype=dtype)
    yield _token_indices()
    if arch.target.backend == "cuda":  # elsewhere many rows use the same tiles as few
        for rows, shuffled in itertools.product((80, 128, 160), (False, True)):
            tile = decode_launch("cuda", 128, half.itemsize, 4, rows * KV_HEADS / arch.chip.num_sms)
            yield _attention(half, 128, shuffled, rows=rows, tile=tile)
    if arch.chip.wgmma:
        dtypes = half, torch.float16
        for dtype, head_dim, group, block_size in itertools.product(dtypes, (64, 128), (1, 5), (16, 256)):
            yield _hopper_extend(dtype, head_dim, group, block_size)
        yield from (_hopper_extend(half, head_dim, 8, 16, special=True) for head_dim in (64, 128))
        yield from (_hopper_dense(causal) for causal in (False, True))
        yield from (_hopper_mla(heads, splits) for heads in (8, 16) for splits in (1, 2))
        yield _hopper_mla(16, 1, block_size=64)
    for kv in (half, fp8):
        if arch.target.backend == "cuda":  # elsewhere it is not used
            yield from (_linearize(kv, head_dim) for head_dim in (64, 80, 128, 256))
            for special in (False, True):
                yield _attention(kv, 128, False, query_len=256, special=special, num_splits=4)
        yield from (_write_latent(kv, tokens) for tokens in (ROWS, 4096))
        for heads in (8, 16, 32, 64, 128):
            yield from (_mla(kv, heads, splits) for splits in SPLITS)


def quick_cases(arch: Arch) -> Iterator[Case]:
    """One case of each attention kernel, and of each kind of kernel that no interpreter runs; takes seconds."""
    yield _attention(torch.bfloat16, 128, True, num_splits=8)
    yield _attention(arch.fp8, 128, False, special=True)
    yield _prefill(torch.bfloat16, 128, True)
    yield _mla(torch.bfloat16, 16, 64)
    yield _write(arch.fp8, 128, True, True, True)
    yield _write_latent(torch.bfloat16)
    yield _token_indices()
    yield from [*medium_launches(arch.chip)][2::2]  # plain, gated, in parts
    yield from [case for case in scaled_launches(arch.chip, arch.fp8) if case[0] in _QUICK]
    if arch.chip.wgmma:
        yield _hopper_extend(torch.bfloat16, 128, 4, 16)
        yield _hopper_dense(True)
        yield _hopper_mla(16, 1)
        yield from large_launches(arch.chip)


def _driver(arch: str) -> SimpleNamespace:
    """The part of a Triton driver that compiling needs; the "device" is the architecture's name."""
    return SimpleNamespace(
        get_current_target=lambda: ARCHS[arch].target,
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )


def compile_case(arch: str, case: Case) -> list[Compiled]:
    """Compile what the case launches, one entry per kernel."""
    name, launch = case
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_read(arch, self.__name__.strip("_").removesuffix("_kernel"), name, kernel))
        return kernel

    driver.set_active(_driver(arch))
    version = "0" if ARCHS[arch].target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(torch.version, "hip", version):
        launch()
    return found


def _read(arch: str, name: str, case: str, kernel: Any) -> Compiled:
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    of = ARCHS[arch]
    programs = of.shared_per_core // shared if shared else 32
    if of.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, agprs, spills = (
            int(re.search(rf"\.{what}:\s+(\d+)", text)[1])  # type: ignore[index]
            for what in ("vgpr_count", "agpr_count", "vgpr_spill_count")
        )
        waves = min(8, 512 // (-(-registers // 8) * 8), max(1, programs * warps // 4))
        return Compiled(arch, name, case, warps, registers, agprs, spills, shared, waves)
    registers, spills = _sm_registers(kernel.asm["cubin"])
    threads = 32 * warps
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return Compiled(
        arch, name, case, warps, registers, 0, spills, shared, min(by_registers, 2048 // threads, programs, 32)
    )


def _sm_registers(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, local loads and stores) of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    return int(found[1]) if found else 0, len(re.findall(r"\b(?:LDL|STL)\b", code))


def _row(c: Compiled) -> str:
    registers = f"{c.registers} ({c.agprs} acc)" if c.agprs else str(c.registers)
    shared = f"{c.shared / 1024:.1f}"
    return (
        f"| {c.arch} | {c.kernel} | {c.case} | {c.warps} | {registers} | {c.spills} | {shared} | {c.occupancy} |"
        f" {c.problem or ''} |"
    )


def _summary(compiled: Iterable[Compiled]) -> Iterator[str]:
    """A line for each kernel on each architecture: the table of docs/ROCM.md."""
    yield "| arch | kernel | configurations | most registers | spills | most shared KiB | least occupancy |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for one in compiled:
        groups.setdefault((one.arch, one.kernel), []).append(one)
    for (arch, kernel), found in groups.items():
        registers, shared = max(one.registers for one in found), max(one.shared for one in found) / 1024
        spills, occupancy = sum(one.spills for one in found), min(one.occupancy for one in found)
        yield f"| {arch} | {kernel} | {len(found)} | {registers} | {spills} | {shared:.1f} | {occupancy} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel the engine can launch, without a GPU.")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument(
        "--quick", action="store_true", help="each attention kernel once, and kernels that no interpreter runs"
    )
    parser.add_argument("--problems", action="store_true", help="print only what fails")
    arguments = parser.parse_args()
    print("| arch | kernel | launch | warps | registers | spills | shared KiB | occupancy | problem |")
    print("|---|---|---|---|---|---|---|---|---|")
    compiled: list[Compiled] = []
    for arch in arguments.arch:
        for case in (quick_cases if arguments.quick else cases)(ARCHS[arch]):
            for one in compile_case(arch, case):
                compiled.append(one)
                if one.problem or not arguments.problems:
                    print(_row(one), flush=True)
    print("", *_summary(compiled), sep="\n")
    failed = [one for one in compiled if one.problem]
    print(f"\n{len(compiled)} configurations compiled, {len(failed)} with a problem.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
