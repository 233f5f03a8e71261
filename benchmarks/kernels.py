"""The Triton attention kernels alone, on this GPU, compared with a device copy: `python -m benchmarks.kernels`.

Every case runs inside a CUDA graph, one call per "layer". Each layer has separate planes, together far larger than the
L2 cache, so that keys and values come from memory as they do in a model. Block tables are shuffled. `--tune` times
other tile sizes and numbers of splits instead, and prints the best.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miniserve.attention.platform import detect_platform
from miniserve.bench.report import header, write_json
from miniserve.kernels.triton.cache_write import rope_and_write, write_kv
from miniserve.kernels.triton.common import platform
from miniserve.kernels.triton.launch import Launch, cdiv, choose_splits, decode_launch, mla_launch
from miniserve.kernels.triton.mla_decode import mla_decode
from miniserve.kernels.triton.paged_decode import paged_decode
from miniserve.kernels.triton.paged_extend import paged_extend
from miniserve.kernels.triton.runtime import gluon_kernels
from miniserve.kernels.triton.split_kv import DecodeScratch

BLOCK_SIZE, HEAD_DIM = 16, 128
POOL_BYTES = 4 << 30
COLD_BYTES = 400 << 20  # bytes that the layers of a graph hold together, at least
HEADS = ((32, 8), (64, 4), (16, 8))
DECODE = (
    *((batch, 1024) for batch in (1, 4, 8, 16, 32, 64, 128)),
    *((1, context) for context in (8192, 32768, 131072)),
    *((8, 4096), (16, 8192), (32, 4096), (64, 4096), (128, 2048), (256, 1088)),
)


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel at one shape. gigabytes_per_second: bytes that it must read and write; copy: that as a share of a
    device copy's; teraflops: of its matrix products."""

    kernel: str
    case: str
    variant: str
    microseconds: float
    gigabytes_per_second: float
    copy: float
    teraflops: float


class Bench:
    """Times calls on one device; `pool` is memory for the caches of all cases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        found = detect_platform(device, torch.bfloat16)
        self.sms = found.compute_units
        self.pool = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16, device=device).normal_()
        self.pool_fp8 = self.pool[: len(self.pool) // 2].to(found.fp8_dtype)
        self.copy_rate = self._copy_rate()
        self.results: list[Timed] = []

    def _copy_rate(self) -> float:
        """Bytes read and written per second by a copy of 1 GiB."""
        half = self.pool[: 1 << 29]
        other = self.pool[1 << 29 : 1 << 30]
        seconds = min(self._seconds(lambda: other.copy_(half), 1) for _ in range(5))
        return 2 * half.nbytes / seconds

    def _seconds(self, run: Callable[[], object], calls: int) -> float:
        """Seconds per call; `run` makes `calls` of them."""
        repeats = 3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats / calls

    def time(
        self,
        layers: Sequence[Callable[..., object]],
        kernel: str,
        case: str,
        variant: str,
        num_bytes: int,
        flops: float = 0,
    ) -> Timed:
        """Time one call of each of `layers` in a graph, print and keep the mean per call."""
        layers[0]()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        calls = [*layers] * max(1, 30 // len(layers))
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        seconds = min(self._seconds(graph.replay, len(calls)) for _ in range(3))
        rate = num_bytes / seconds
        timed = Timed(kernel, case, variant, seconds * 1e6, rate / 1e9, rate / self.copy_rate, flops / seconds / 1e12)
        self.results.append(timed)
        speed = f"{timed.teraflops:6.0f} TFLOP/s" if flops else f"{rate / 1e9:6.0f} GB/s {timed.copy:6.1%} of copy"
        print(f"{kernel:15} {case:28} {variant:34} {timed.microseconds:8.1f} µs {speed}", flush=True)
        return timed

    def planes(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """Planes of these shapes for so many layers that the L2 cache is useless, taken from the pool."""
        pool = self.pool_fp8 if dtype.itemsize == 1 else self.pool
        sizes = [math.prod(shape) for shape in shapes]
        wanted = min(64, max(2, cdiv(COLD_BYTES, sum(sizes) * dtype.itemsize)))
        layers, at = [], 0
        for _ in range(min(wanted, len(pool) // sum(sizes))):
            layer = []
            for shape, size in zip(shapes, sizes, strict=True):
                layer.append(pool[at : at + size].view(shape))
                at += size
            layers.append(layer)
        return layers


def kv_shapes(num_blocks: int, kv_heads: int, dtype: torch.dtype, shuffled: bool) -> Sequence[tuple[int, ...]]:
    x = 16 // dtype.itemsize
    if not shuffled:
        return 2 * [(num_blocks, BLOCK_SIZE, kv_heads, HEAD_DIM)]
    return [(num_blocks, kv_heads, HEAD_DIM // x, BLOCK_SIZE, x), (num_blocks, kv_heads, BLOCK_SIZE // x, HEAD_DIM, x)]


def shuffled_tables(rows: int, context: int, device: torch.device) -> torch.Tensor:
    width = cdiv(context, BLOCK_SIZE)
    return torch.randperm(rows * width, device=device).int().view(rows, width)


@dataclass(frozen=True, slots=True)
class Split:
    """A way to launch a decode. fused: whether the kernel merges the splits, None: by the kernel's own rule."""

    launch: Launch
    num_splits: int
    fused: bool | None = None

    def __str__(self) -> str:
        merge = {None: "", True: " fused", False: " 2 kernels"}[self.fused] if self.num_splits > 1 else ""
        tile = f"n{self.launch.block_n} w{self.launch.num_warps} s{self.launch.num_stages}"
        return f"{tile} splits {self.num_splits}{merge}"


def decode(
    bench: Bench, heads: int, kv_heads: int, batch: int, context: int, shuffled: bool, dtype: torch.dtype,
    splits: list[Split] | None = None,
) -> list[Timed]:  # fmt: skip
    tables = shuffled_tables(batch, context, bench.device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    q = torch.randn(batch, heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    out, one = torch.empty_like(q), torch.ones(1, device=bench.device)
    if splits is None:
        pairs = batch * kv_heads / bench.sms
        launch = decode_launch(platform(), HEAD_DIM, dtype.itemsize, heads // kv_heads, pairs)
        splits = [Split(launch, choose_splits(batch, kv_heads, context, launch, bench.sms))]
    layers = bench.planes(kv_shapes(tables.numel(), kv_heads, dtype, shuffled), dtype)
    name = f"decode {'shuffled' if shuffled else 'linear'} {'fp8' if dtype.itemsize == 1 else 'bf16'}"
    scratch = DecodeScratch.allocate([(batch, s.num_splits) for s in splits], heads, HEAD_DIM, bench.device)
    scales: dict[str, Any] = {"k_scale": one, "v_scale": one} if dtype.itemsize == 1 else {}

    def calls(split: Split) -> list[Callable[[], object]]:
        return [
            partial(
                paged_decode, q, key, value, tables, lengths, num_kv_heads=kv_heads, block_size=BLOCK_SIZE,
                shuffled=shuffled, scale=HEAD_DIM**-0.5, num_splits=split.num_splits, scratch=scratch, out=out,
                launch=split.launch, fused_merge=split.fused, **scales,
            )
            for key, value in layers
        ]  # fmt: skip

    num_bytes = 2 * batch * context * kv_heads * HEAD_DIM * dtype.itemsize
    return _time_splits(bench, splits, calls, name, f"{heads}/{kv_heads} {batch} x {context}", num_bytes)


def _time_splits(
    bench: Bench,
    splits: list[Split],
    calls: Callable[[Split], list[Callable[[], object]]],
    name: str,
    case: str,
    num_bytes: int,
) -> list[Timed]:
    timed = []
    for split in splits:
        try:
            timed.append(bench.time(calls(split), name, case, str(split), num_bytes))
        except Exception as error:  # skip a tile that does not fit
            if len(splits) == 1:
                raise
            print(f"{name} {case} {split}: {type(error).__name__}")
    return timed


def mla(bench: Bench, heads: int, batch: int, context: int, splits: list[Split] | None = None) -> list[Timed]:
    tables = shuffled_tables(batch, context, bench.device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    q = torch.randn(batch, heads, 576, dtype=torch.bfloat16, device=bench.device)
    hopper = gluon_kernels("hopper_mla", bench.device, "its time is missing") if splits is None else None
    if splits is None:
        launch = mla_launch(platform(), heads, 2)
        tiles = cdiv(heads, launch.block_m)
        splits = [Split(launch, choose_splits(batch, tiles, context, launch, bench.sms))]
    scratch = DecodeScratch.allocate([(batch, s.num_splits) for s in splits], heads, 512, bench.device)
    layers = bench.planes([(tables.numel(), BLOCK_SIZE, 576)], torch.bfloat16)
    out = torch.empty(batch, heads, 512, dtype=torch.bfloat16, device=bench.device)

    def calls(split: Split) -> list[Callable[[], object]]:
        return [
            partial(
                mla_decode, q[..., :512], q[..., 512:], cache, tables, lengths, scale=0.1, out=out,
                num_splits=split.num_splits, scratch=scratch, launch=split.launch, fused_merge=split.fused,
            )
            for (cache,) in layers
        ]  # fmt: skip

    num_bytes = 2 * batch * context * 576
    case = f"{heads} heads {batch} x {context}"
    timed = _time_splits(bench, splits, calls, "mla bf16", case, num_bytes)
    if hopper is not None and hopper.can_decode(q[..., :512], q[..., 512:], layers[0][0]):
        terms = {"scale": 0.1, "out": out, "num_splits": hopper.splits_of(batch, context, bench.sms)}
        given = q[..., :512], q[..., 512:]
        own = [partial(hopper.hopper_mla, *given, c, tables, lengths, scratch=scratch, **terms) for (c,) in layers]
        timed.append(bench.time(own, "hopper mla bf16", case, f"{terms['num_splits']} splits", num_bytes))
    flops = 2.0 * batch * context * heads * (576 + 512)
    print(f"{'':15} {flops / timed[-1].microseconds / 1e6:.0f} TFLOP/s") if timed else None
    return timed


def extend(
    bench: Bench, heads: int, kv_heads: int, context: int, new: int, shuffled: bool, launch: Launch | None = None
) -> Timed:
    length = context + new
    tables = shuffled_tables(1, length, bench.device)
    q = torch.randn(new, heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    out = torch.empty_like(q)
    starts, lengths = (torch.tensor(v, dtype=torch.int32, device=bench.device) for v in ([0, new], [length]))
    layers = bench.planes(kv_shapes(tables.numel(), kv_heads, torch.bfloat16, shuffled), torch.bfloat16)[:2]
    calls = [
        partial(
            paged_extend, q, key, value, tables, starts, lengths, max_query_len=new, num_kv_heads=kv_heads,
            block_size=BLOCK_SIZE, shuffled=shuffled, scale=HEAD_DIM**-0.5, out=out, launch=launch,
        )
        for key, value in layers
    ]  # fmt: skip
    flops = 4.0 * heads * HEAD_DIM * (new * context + new * (new + 1) / 2)
    tile = f"m{launch.block_m} n{launch.block_n} w{launch.num_warps} s{launch.num_stages}" if launch else ""
    name = f"extend {'shuffled' if shuffled else 'linear'}"
    moved = 2 * (2 * new * heads + 2 * length * kv_heads) * HEAD_DIM
    return bench.time(calls, name, f"{heads}/{kv_heads} {new} after {context}", tile, moved, flops)


def writes(bench: Bench, heads: int, kv_heads: int, tokens: int, shuffled: bool) -> None:
    dims = (heads + 2 * kv_heads) * HEAD_DIM
    qkv = torch.randn(tokens, dims, dtype=torch.bfloat16, device=bench.device)
    split = qkv.view(tokens, -1, HEAD_DIM)
    k, v = split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
    cos_sin = torch.randn(tokens, HEAD_DIM, device=bench.device)
    weight = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    layers = bench.planes(kv_shapes(8192, kv_heads, torch.bfloat16, shuffled), torch.bfloat16)
    slots = torch.randperm(8192 * BLOCK_SIZE, device=bench.device)[:tokens]
    if tokens > 256:
        slots = torch.arange(tokens, device=bench.device)
    out = torch.empty(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device=bench.device)
    where: dict[str, Any] = {"block_size": BLOCK_SIZE, "shuffled": shuffled}
    case, name = f"{heads}/{kv_heads} {tokens} tokens", "shuffled" if shuffled else "linear"
    plain = [partial(write_kv, k, v, key, value, slots, **where) for key, value in layers]
    bench.time(plain, f"write {name}", case, "", 8 * tokens * kv_heads * HEAD_DIM)
    fused = [
        partial(
            rope_and_write, qkv, cos_sin, weight, weight, 1e-6, key, value, slots, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=HEAD_DIM, q_out=out, **where,
        )
        for key, value in layers
    ]  # fmt: skip
    bench.time(fused, f"rope+write {name}", case, "with qk-norm", 4 * tokens * dims)


def standard(bench: Bench) -> None:
    """The table of docs/BENCHMARKS.md."""
    for (heads, kv_heads), (batch, context), shuffled in itertools.product(HEADS, DECODE, (False, True)):
        decode(bench, heads, kv_heads, batch, context, shuffled, torch.bfloat16)
    for (batch, context), shuffled in itertools.product(((1, 8192), (64, 4096), (256, 1088)), (False, True)):
        decode(bench, 32, 8, batch, context, shuffled, bench.pool_fp8.dtype)
    for heads, (batch, context) in itertools.product((16, 128), ((1, 4096), (8, 4096), (64, 4096))):
        mla(bench, heads, batch, context)
    for context, shuffled in itertools.product((0, 8192), (False, True)):
        extend(bench, 32, 8, context, 2048, shuffled)
        extend(bench, 32, 8, context + 4096, 4, shuffled)
    for tokens, shuffled in itertools.product((1, 256, 8192), (False, True)):
        writes(bench, 32, 8, tokens, shuffled)


_time = operator.attrgetter("microseconds")


def _ways(bench: Bench, tiles: list[Launch], batch: int, head_tiles: int, context: int) -> Iterator[Split]:
    for tile in tiles:
        numbers = {choose_splits(batch, head_tiles, context, tile, bench.sms, programs_per_sm=p) for p in (1, 2, 4, 6)}
        for num in sorted(numbers):
            yield from [Split(tile, num, fused) for fused in (True, False)] if num > 1 else [Split(tile, 1)]


def tune(bench: Bench) -> None:
    """Time other tiles and splits at the shapes that matter, best last."""
    best: list[str] = []
    tiles = [
        Launch(16, n, w, s) for n, w, s in ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 2))
    ]
    cases = (
        (32, 8, 1, 1024),
        (32, 8, 1, 8192),
        (32, 8, 1, 131072),
        (32, 8, 64, 4096),
        (32, 8, 256, 1088),
        (64, 4, 64, 4096),
    )
    for (heads, kv_heads, batch, context), shuffled in itertools.product(cases, (False, True)):
        ways = list(_ways(bench, tiles, batch, kv_heads, context))
        timed = sorted(decode(bench, heads, kv_heads, batch, context, shuffled, torch.bfloat16, ways), key=_time)
        best += [f"{t.kernel} {t.case}: {t.variant} {t.microseconds:.1f} µs {t.copy:.1%}" for t in timed[:3]]
    latent = {
        16: [Launch(16, n, w, s) for n, w, s in ((32, 4, 2), (32, 4, 3), (32, 8, 3), (64, 4, 2), (64, 8, 2))],
        128: [Launch(m, n, 8, s) for m, n, s in ((64, 32, 2), (64, 32, 3), (64, 64, 2), (32, 32, 3))],
    }
    for heads, batch in itertools.product((16, 128), (1, 64)):
        ways = [way for tile in latent[heads] for way in _ways(bench, [tile], batch, cdiv(heads, tile.block_m), 4096)]
        timed = sorted(mla(bench, heads, batch, 4096, ways), key=_time)
        best += [f"{t.kernel} {t.case}: {t.variant} {t.microseconds:.1f} µs {t.copy:.1%}" for t in timed[:3]]
    extends = [
        Launch(m, n, w, s)
        for m, n, w, s in ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3))
    ]
    for context, shuffled in itertools.product((0, 8192), (False, True)):
        timed = sorted((extend(bench, 32, 8, context, 2048, shuffled, tile) for tile in extends), key=_time)
        best += [f"{t.kernel} {t.case}: {t.variant} {t.teraflops:.0f} TFLOP/s" for t in timed[:2]]
    print("\nbest:", *best, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time other tiles and splits instead of the table")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "error: the kernels are timed on a GPU, and PyTorch finds none here.\n")
    torch.manual_seed(0)
    bench = Bench(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: copy {bench.copy_rate / 1e9:.0f} GB/s (bytes read and written)")
    (tune if args.tune else standard)(bench)
    if args.json is not None:
        results = [asdict(timed) for timed in bench.results]
        write_json(args.json, header("kernels") | {"copy": bench.copy_rate, "results": results})


if __name__ == "__main__":
    main()
