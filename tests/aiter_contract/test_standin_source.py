"""The stand-in against a checkout of the real source (AITER_SRC), of any version: signatures, kernel tables. How it is
installed."""

from __future__ import annotations

import ast
import csv
import inspect
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
from aiter_standin import environment, installed, read_calls, write_metadata

SIGNATURES = {
    "aiter/ops/attention.py": (
        "paged_attention_v1",
        "paged_attention_rocm",
        "paged_attention_common",
        "_should_use_asm_kernel",
        "pa_fwd_asm",
        "get_mla_metadata_info_v1",
        "get_mla_metadata_v1",
    ),
    "aiter/ops/cache.py": (
        "reshape_and_cache",
        "reshape_and_cache_flash",
        "concat_and_cache_mla",
        "fused_qk_rope_concat_and_cache_mla",
    ),
    "aiter/ops/mha.py": ("flash_attn_varlen_func", "mha_batch_prefill_func"),
    "aiter/mla.py": ("mla_decode_fwd",),
    "aiter/ops/triton/attention/unified_attention.py": ("unified_attention",),
    "aiter/ops/triton/fusions/fused_kv_cache.py": ("fused_qk_rope_reshape_and_cache",),
    "aiter/ops/triton/gluon/pa_decode_gluon.py": ("pa_decode_gluon",),
    "aiter/ops/rmsnorm.py": ("rms_norm", "rmsnorm2d_fwd", "rmsnorm2d_fwd_with_add"),
    "aiter/ops/activation.py": ("silu_and_mul",),
    "aiter/ops/rope.py": (
        "rope_cached_positions_fwd",
        "rope_cached_positions_2c_fwd",
        "rope_cached_positions_2c_fwd_inplace",
    ),
    "aiter/ops/moe_op.py": ("topk_softmax",),
    "aiter/ops/topk.py": ("grouped_topk", "biased_grouped_topk"),
    "aiter/fused_moe.py": ("fused_moe",),
    "aiter/ops/shuffle.py": ("shuffle_weight",),
    "aiter/ops/gemm_op_a8w8.py": ("gemm_a8w8_blockscale",),
}


@pytest.fixture(scope="module")
def aiter() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


@pytest.fixture(scope="module")
def source() -> Path:
    found = os.environ.get("AITER_SRC")
    if not found:
        pytest.skip("AITER_SRC names no checkout of github.com/ROCm/aiter to compare with")
    return Path(found)


Parameters = dict[str, str | None]


def parameters(function: ast.FunctionDef) -> Parameters:
    """Each one's default as written, in order."""
    given = function.args.args
    defaults = [None] * (len(given) - len(function.args.defaults)) + [ast.unparse(d) for d in function.args.defaults]
    return {arg.arg: default for arg, default in zip(given, defaults, strict=True)}


def changes(ours: Parameters, real: Parameters) -> list[str]:
    """What would go wrong with a call that is right for ours. More parameters with defaults, behind ours, are fine."""
    found = [f"it lacks {name}" for name in ours if name not in real]
    shared = [name for name in real if name in ours]
    found += [f"{name} has the default {real[name]}, not {ours[name]}" for name in shared if real[name] != ours[name]]
    found += [f"it needs {name}" for name, default in real.items() if name not in ours and default is None]
    places = dict(zip(real, ours, strict=False))
    moved = [name for name, place in places.items() if name != place]
    found += [f"{moved[0]} is where {places[moved[0]]} was"] if moved and not found else []
    return found


def definition(source: Path, path: str, name: str) -> ast.FunctionDef:
    """The function where it was, or wherever else under `aiter` there is one of that name, which is said."""
    elsewhere = (found for found in sorted((source / "aiter").rglob("*.py")) if found != source / path)
    for file in (source / path, *elsewhere):
        text = file.read_text() if file.exists() else ""
        for node in ast.parse(text).body if f"def {name}(" in text else ():
            if isinstance(node, ast.FunctionDef) and node.name == name:
                if file != source / path:
                    warnings.warn(f"{name} has moved to {file.relative_to(source)}; is {path} a shim?", stacklevel=1)
                return node
    pytest.fail(f"there is no {name} any more; it was in {path}")


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in SIGNATURES.items() for name in names])
def test_calls_of_the_stand_in_fit_the_real_ones(aiter: ModuleType, source: Path, path: str, name: str) -> None:
    module = import_module(path.removesuffix(".py").replace("/", "."))
    ours = ast.parse(textwrap.dedent(inspect.getsource(getattr(module, name)))).body[0]
    assert isinstance(ours, ast.FunctionDef)
    found = changes(parameters(ours), parameters(definition(source, path, name)))
    assert not found, f"{name}: {'; '.join(found)}"


def test_a_changed_signature_is_named() -> None:
    ours = {"q": None, "k": None, "scale": "1.0", "window": "0"}
    for real, found in (
        (ours | {"extra": "None"}, []),
        ({"q": None, "k": None, "scale": "1.0"}, ["it lacks window"]),
        (ours | {"scale": "None"}, ["scale has the default None, not 1.0"]),
        ({"q": None, "v": None, **ours}, ["it needs v"]),
        ({"k": None, **ours}, ["k is where q was"]),
        ({"q": None, "k": None, "more": "1", "scale": "1.0", "window": "0"}, ["more is where scale was"]),
    ):
        assert changes(ours, real) == found


def test_a_moved_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "aiter" / "new").mkdir(parents=True)
    (tmp_path / "aiter" / "new" / "place.py").write_text("def other(): ...\ndef mla_decode_fwd(q, o=1): ...\n")
    with pytest.warns(UserWarning, match=r"moved to aiter/new/place\.py; is aiter/mla\.py a shim"):
        assert parameters(definition(tmp_path, "aiter/mla.py", "mla_decode_fwd")) == {"q": None, "o": "1"}
    with pytest.raises(pytest.fail.Exception, match="there is no pa_fwd_asm any more"):
        definition(tmp_path, "aiter/ops/attention.py", "pa_fwd_asm")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_asm_kernels_are_the_shipped_ones(aiter: ModuleType, source: Path, arch: str) -> None:
    with (source / "hsa" / arch / "pa" / "pa_asm.csv").open() as table:
        rows = [row for row in csv.DictReader(table) if row["ps"] == "0"]
    keys = ("Gqa", "Mtp", "Msk", "Hp", "blkSz")
    real = {(row["qType"], row["kvType"], *(int(row[key]) for key in keys)) for row in rows}
    ours = import_module("aiter._asm").kernels(arch)
    assert (sorted(ours - real), sorted(real - ours)) == ([], []), "gone, and new"


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_latent_kernels_are_the_shipped_ones(aiter: ModuleType, source: Path, arch: str) -> None:
    """Those of decode that mask, without context parallelism."""
    mla = import_module("aiter.mla")
    with (source / "hsa" / arch / "mla" / "mla_asm.csv").open() as table:
        rows = [row for row in csv.DictReader(table) if (row["prefill"], row["causal"]) == ("0", "1")]
    for lse in ("0", "1"):
        real = {
            (f"{row['qType']} {row['kvType']}", int(row["Gqa"]), int(row["ps"]), int(row["qSeqLen"]))
            for row in rows
            if (row["lse"], row.get("cprr", "0")) == (lse, "0") and row["kvType"] != "byte"
        }
        tables = (mla._SHARED, mla._OWN[arch]) if lse == "0" else (mla._LSE[arch],)
        ours = {(kinds, *row) for table in tables for kinds, found in table.items() for row in found}
        assert (sorted(ours - real), sorted(real - ours)) == ([], []), f"gone, and new, with lse {lse}"


def test_the_gluon_kernels_count_a_window_from_after_the_last_key(source: Path) -> None:
    """As `paged_gluon` and the stand-in have it: W - query_length keys are seen, the query's own among them."""
    text = (source / "aiter/ops/triton/gluon/pa_decode_gluon.py").read_text()
    start = text.index("def paged_attention_decode_sliding_window(")
    kernel = text[start : text.index("@gluon.jit", start)]
    assert "sequence_start_idx = context_length - SLIDING_WINDOW" in kernel
    assert ">= sequence_start_idx + query_token_idx[:, None] + 1" in kernel  # one query token
    assert ">= sequence_start_idx + query_seq_len" in kernel  # several


def test_the_enums_are_the_real_ones(aiter: ModuleType, source: Path) -> None:
    header = (source / "csrc/include/aiter_enum.h").read_text().replace(" ", "")
    for enum in (aiter.ActivationType, aiter.QuantType, aiter.MlaVersion):
        assert f"enumclass{enum.__name__}:int" in header, f"there is no {enum.__name__}"
        real, value = {}, -1
        for entry in header.split(f"enumclass{enum.__name__}:int")[1].split("{")[1].split("}")[0].split(","):
            name, _, given = entry.strip().partition("=")
            value = int(given) if given else value + 1
            real[name] = value
        assert {member.name: member.value for member in enum}.items() <= real.items()


def test_a_child_process_gets_the_device_it_was_given(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    code = (
        "import torch, aiter, aiter._version\n"
        "aiter.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)\n"
        "from aiter.jit.utils.chip_info import get_cu_num, get_gfx\n"
        "from importlib.metadata import version\n"
        "print(get_gfx(), get_cu_num(), aiter.dtypes.fp8, aiter._version.__version__, version('amd-aiter'))"
    )
    where = write_metadata(tmp_path / "metadata", "0.1.16")
    env = environment("gfx950", 7, version="0.1.16", log=log, metadata=where)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gfx950", "7", "torch.float8_e4m3fn", "0.1.16", "0.1.16"]
    assert read_calls(log) == [("rms_norm", "")]


def test_nothing_is_left_installed() -> None:
    before = list(sys.path)
    with installed(arch="gfx950") as module:
        assert (metadata.version("amd-aiter"), module._standin.device.cus) == ("0.1.20.post1", 256)
        assert not hasattr(module, "__version__")  # the real package has none either
    assert sys.path == before
