"""`python -m miniserve.kernels.triton.compile_check`: compile what the engine can launch, for GPUs that are not there.

Every case calls a kernel's own wrapper on tensors without storage, with Triton's driver replaced by the name of an
architecture: what is compiled is what would be launched. From the compiled code come registers, spills, shared memory
and an estimate of the occupancy. A vector register spilled on AMD, or more shared memory than there is, fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from miniserve.kernels.triton import cache_write, linearize, mla_decode, paged_decode, paged_extend, token_indices
from miniserve.kernels.triton.compile_step import medium_launches, step_launches
from miniserve.kernels.triton.small_linear import Chip
from miniserve.kernels.triton.split_kv import DecodeScratch

ROWS, NUM_BLOCKS, TABLE_WIDTH, KV_HEADS = 64, 1 << 20, 4096, 8  # planes of many GiB: 64-bit offsets
SPLITS = (1, 2, 64)  # no merge, one by the last split to arrive, one by a kernel of its own (AMD: always that)


@dataclass(frozen=True, slots=True)
class Arch:
    """cores: compute units or multiprocessors; shared: bytes one program may have; shared_per_core: bytes of a core."""

    target: GPUTarget
    fp8: torch.dtype
    cores: int
    shared: int
    shared_per_core: int


ARCHS = {
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), torch.float8_e4m3fnuz, 304, 64 << 10, 64 << 10),
    "gfx950": Arch(GPUTarget("hip", "gfx950", 64), torch.float8_e4m3fn, 256, 160 << 10, 160 << 10),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), torch.float8_e4m3fn, 132, 227 << 10, 228 << 10),
}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    launch: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler said of one kernel. agprs: those of the registers that only the matrix unit's results may use
    (AMD); occupancy: waves per SIMD (AMD) or programs per multiprocessor (NVIDIA)."""

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
        if self.shared > ARCHS[self.arch].shared:
            return f"needs {self.shared} bytes of shared memory, of {ARCHS[self.arch].shared}"
        return None


def _tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _planes(kv_dtype: torch.dtype, block_size: int, head_dim: int, shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = 16 // kv_dtype.itemsize
    key: tuple[int, ...] = (NUM_BLOCKS, block_size, KV_HEADS, head_dim)
    value = key
    if shuffled:
        key = (NUM_BLOCKS, KV_HEADS, head_dim // x, block_size, x)
        value = (NUM_BLOCKS, KV_HEADS, block_size // x, head_dim, x)
    return _tensor(*key, dtype=kv_dtype), _tensor(*value, dtype=kv_dtype)


def _scales(kv_dtype: torch.dtype) -> dict[str, Any]:
    one = _tensor(1, dtype=torch.float32) if kv_dtype.itemsize == 1 else None
    return {"k_scale": one, "v_scale": one}


def _int32(*shape: int) -> torch.Tensor:
    return _tensor(*shape, dtype=torch.int32)


def _formula(heads: int, special: bool) -> dict[str, Any]:
    if not special:
        return {"scale": 0.1}
    return {"scale": 0.1, "window": 1024, "softcap": 30.0, "sinks": _tensor(heads, dtype=torch.float32)}


def _decode(
    kv: torch.dtype, head_dim: int, shuffled: bool, *, dtype: torch.dtype = torch.bfloat16, group: int = 4,
    block_size: int = 16, num_splits: int = 1, special: bool = False,
) -> Case:  # fmt: skip
    heads = group * KV_HEADS

    def launch() -> None:
        key, value = _planes(kv, block_size, head_dim, shuffled)
        paged_decode.paged_decode(
            _tensor(ROWS, heads, head_dim, dtype=dtype), key, value,
            _int32(ROWS, TABLE_WIDTH), _int32(ROWS), num_kv_heads=KV_HEADS, block_size=block_size, shuffled=shuffled,
            num_splits=num_splits, scratch=DecodeScratch.allocate([(ROWS, num_splits)], heads, head_dim, _META),
            **_formula(heads, special), **_scales(kv),
        )  # fmt: skip

    merge = "" if num_splits == 1 else f", {num_splits} splits"
    return Case(f"{_what(dtype, kv, shuffled, block_size)} d{head_dim} gqa{group}{merge}{_special(special)}", launch)


def _extend(
    kv: torch.dtype, head_dim: int, shuffled: bool, *, dtype: torch.dtype = torch.bfloat16, group: int = 4,
    query_len: int = 2048, special: bool = False, num_splits: int = 1,
) -> Case:  # fmt: skip
    heads = group * KV_HEADS

    def launch() -> None:
        key, value = _planes(kv, 16, head_dim, shuffled)
        paged_extend.paged_extend(
            _tensor(ROWS * query_len, heads, head_dim, dtype=dtype), key, value,
            _int32(ROWS, TABLE_WIDTH), _int32(ROWS + 1), _int32(ROWS), max_query_len=query_len,
            num_kv_heads=KV_HEADS, block_size=16, shuffled=shuffled, num_splits=num_splits,
            **_formula(heads, special), **_scales(kv),
        )  # fmt: skip

    merge = "" if num_splits == 1 else f", {num_splits} splits"
    return Case(
        f"{_what(dtype, kv, shuffled, 16)} d{head_dim} gqa{group} q{query_len}{merge}{_special(special)}", launch
    )


def _linearize(kv: torch.dtype, head_dim: int) -> Case:
    def launch() -> None:
        tables, starts, lens = _int32(ROWS, TABLE_WIDTH), _int32(ROWS + 1), _int32(ROWS)
        linearize.linearize(*_planes(kv, 16, head_dim, True), tables, starts, lens)

    return Case(f"{_NAMES[kv]} block 16 d{head_dim}", launch)


def _mla(kv: torch.dtype, heads: int, num_splits: int, block_size: int = 16) -> Case:
    def launch() -> None:
        mla_decode.mla_decode(
            _tensor(ROWS, heads, 512, dtype=torch.bfloat16), _tensor(ROWS, heads, 192, dtype=torch.bfloat16)[..., 128:],
            _tensor(NUM_BLOCKS, block_size, 576, dtype=kv),
            _int32(ROWS, TABLE_WIDTH), _int32(ROWS), scale=0.1, num_splits=num_splits, kv_scale=_scales(kv)["k_scale"],
            scratch=DecodeScratch.allocate([(ROWS, num_splits)], heads, 512, _META),
        )  # fmt: skip

    merge = "" if num_splits == 1 else f", {num_splits} splits"
    return Case(f"bf16/{_NAMES[kv]} block {block_size} {heads} heads{merge}", launch)


def _write(kv: torch.dtype, head_dim: int, shuffled: bool, normed: bool, keeps_k: bool = False) -> Case:
    def launch() -> None:
        qkv, slots = _tensor(ROWS, 48 * head_dim, dtype=torch.bfloat16), _tensor(ROWS, dtype=torch.int64)
        (key, value), weight = _planes(kv, 16, head_dim, shuffled), _tensor(head_dim, dtype=torch.bfloat16)
        heads = qkv.view(ROWS, 48, head_dim)
        where: dict[str, Any] = {"block_size": 16, "shuffled": shuffled}
        cache_write.write_kv(heads[:, 32:40], heads[:, 40:], key, value, slots, **where, **_scales(kv))
        norm = weight if normed else None
        k_out = _tensor(ROWS, KV_HEADS, head_dim, dtype=torch.bfloat16) if keeps_k else None
        cache_write.rope_and_write(
            qkv, _tensor(ROWS, head_dim, dtype=torch.float32), norm, norm, 1e-6, key, value, slots, num_heads=32,
            num_kv_heads=KV_HEADS, head_dim=head_dim, k_out=k_out, **where, **_scales(kv),
        )  # fmt: skip

    more = (", qk-norm" if normed else "") + (", k kept" if keeps_k else "")
    return Case(f"{_what(torch.bfloat16, kv, shuffled, 16)} d{head_dim}{more}", launch)


def _write_latent(kv: torch.dtype) -> Case:
    def launch() -> None:
        latent, rope = _tensor(ROWS, 512, dtype=torch.bfloat16), _tensor(ROWS, 64, dtype=torch.bfloat16)
        cache = _tensor(NUM_BLOCKS, 16, 576, dtype=kv)
        slots = _tensor(ROWS, dtype=torch.int64)
        cache_write.write_latent(latent, rope, cache, slots, kv_scale=_scales(kv)["k_scale"])

    return Case(f"bf16/{_NAMES[kv]}", launch)


def _token_indices() -> Case:
    def launch() -> None:
        tables, lens, starts = _int32(ROWS, TABLE_WIDTH), _int32(ROWS), _int32(ROWS + 1)
        token_indices.token_indices(tables, lens, starts, _int32(NUM_BLOCKS), block_size=16, max_seq_len=1 << 16)

    return Case("block 16", launch)


_META = torch.device("meta")
_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e4m3fnuz: "fp8",
}


def _what(dtype: torch.dtype, kv: torch.dtype, shuffled: bool, block_size: int) -> str:
    return f"{_NAMES[dtype]}/{_NAMES[kv]} {'shuffled' if shuffled else 'linear'} block {block_size}"


def _special(special: bool) -> str:
    return ", window + softcap + sinks" if special else ""


def cases(arch: Arch) -> Iterator[Case]:
    """Each launch that differs in generated code."""
    half, single, fp8 = torch.bfloat16, torch.float32, arch.fp8
    on_nvidia = arch.target.backend == "cuda"
    yield from (
        Case(name, launch) for name, launch in step_launches(Chip(arch.cores, arch.shared, on_nvidia, wgmma=on_nvidia))
    )
    for shuffled in (False, True):
        for kv in (half, fp8):
            for head_dim in (64, 80, 96, 112, 128, 192, 256):
                yield from (_decode(kv, head_dim, shuffled, num_splits=splits) for splits in SPLITS)
                yield _extend(kv, head_dim, shuffled)
                yield _extend(kv, head_dim, shuffled, query_len=4)
            for group in (1, 16, 32, 64):
                yield from (_decode(kv, 128, shuffled, group=group, num_splits=splits) for splits in SPLITS)
            for block_size in (32, 64):
                yield _decode(kv, 128, shuffled, block_size=block_size)
            for head_dim in (64, 128, 256):
                yield _decode(kv, head_dim, shuffled, special=True, num_splits=8)
                yield _extend(kv, head_dim, shuffled, special=True)
            for normed in (False, True):
                yield _write(kv, 128, shuffled, normed)
            yield _write(kv, 128, shuffled, normed=True, keeps_k=True)
        for head_dim in (64, 128, 256):
            yield _decode(torch.float16, head_dim, shuffled, dtype=torch.float16)
            yield _extend(torch.float16, head_dim, shuffled, dtype=torch.float16)
            yield _decode(single, head_dim, shuffled, dtype=single)
            yield _extend(single, head_dim, shuffled, dtype=single)
    yield _token_indices()
    for kv in (half, fp8):
        if arch.target.backend == "cuda":  # elsewhere it is not used
            yield from (_linearize(kv, head_dim) for head_dim in (64, 80, 128, 256))
            yield from (
                _extend(kv, 128, False, query_len=256, special=special, num_splits=4) for special in (False, True)
            )
        yield _write_latent(kv)
        for heads in (8, 16, 32, 64, 128):
            yield from (_mla(kv, heads, splits) for splits in SPLITS)


def quick_cases(arch: Arch) -> Iterator[Case]:
    """One of each attention kernel, and those that no interpreter runs, in seconds."""
    fp8 = arch.fp8
    yield _decode(torch.bfloat16, 128, True, num_splits=8)
    yield _decode(fp8, 128, False, special=True)
    yield _extend(torch.bfloat16, 128, True)
    yield _mla(torch.bfloat16, 16, 64)
    yield _write(fp8, 128, True, True, True)
    yield _write_latent(torch.bfloat16)
    yield _token_indices()
    chip = Chip(arch.cores, arch.shared, wgmma=arch.target.backend == "cuda")
    yield from (Case(name, launch) for name, launch in medium_launches(chip))


class _Driver:
    """As much of a Triton driver as compiling needs; the "device" is the architecture's name."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return ARCHS[self._arch].target

    def get_current_device(self) -> str:
        return self._arch

    def get_current_stream(self, device: object) -> int:
        return 0


def compile_case(arch: str, case: Case) -> list[Compiled]:
    """Compile what the case launches, one entry per kernel."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_read(arch, self.__name__.strip("_").removesuffix("_kernel"), case.name, kernel))
        return kernel

    driver.set_active(_Driver(arch))
    version = "0" if ARCHS[arch].target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(torch.version, "hip", version):
        case.launch()
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel the engine can launch, without a GPU.")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument("--quick", action="store_true", help="one case of each kernel")
    parser.add_argument("--problems", action="store_true", help="print only what fails")
    arguments = parser.parse_args()
    print("| arch | kernel | launch | warps | registers | spills | shared KiB | occupancy | problem |")
    print("|---|---|---|---|---|---|---|---|---|")
    compiled: dict[tuple[str, str, str], Compiled] = {}
    for arch in arguments.arch:
        for case in (quick_cases if arguments.quick else cases)(ARCHS[arch]):
            for one in compile_case(arch, case):
                compiled[one.arch, one.kernel, one.case] = one
                if one.problem or not arguments.problems:
                    print(_row(one), flush=True)
    failed = [one for one in compiled.values() if one.problem]
    print(f"\n{len(compiled)} kernels compiled, {len(failed)} with a problem.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
