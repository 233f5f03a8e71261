"""Platforms, named and found, and every way in which aiter cannot be had: a sentence each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miniserve.attention import aiter
from miniserve.attention.platform import NAMED_PLATFORMS, detect_platform

INIT = "class dtypes:\n    fp8 = None\n" + "\n".join(f"def {name}(): ..." for name in aiter.Aiter.__dataclass_fields__)
PACKAGE = {
    "__init__.py": INIT,
    "_version.py": "__version__ = '0.1.20.post1'",
    "ops/triton/attention/unified_attention.py": "def unified_attention(): ...",
    "ops/triton/fusions/fused_kv_cache.py": "def fused_qk_rope_reshape_and_cache(): ...",
    "jit/utils/chip_info.py": "def get_gfx(): return 'gfx942'\ndef get_cu_num(): return 304",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory from which `aiter` is imported, and from nowhere else."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "aiter").exists())])
    aiter.load.cache_clear()
    yield tmp_path
    aiter.load.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


def install(directory: Path, **changes: str) -> None:
    for path, text in (PACKAGE | changes).items():
        (directory / "aiter" / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / "aiter" / path).write_text(text)


def reason() -> str:
    with pytest.raises(aiter.Unavailable) as error:
        aiter.load()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_aiter_as_it_should_be(packages: Path) -> None:
    install(packages)
    found = aiter.load()
    assert (found.version, found.arch, found.compute_units) == ((0, 1, 20), "gfx942", 304)
    assert callable(found.unified_attention)


def test_aiter_is_not_installed(packages: Path) -> None:
    assert "aiter is not installed" in reason()


def test_another_package_of_that_name(packages: Path) -> None:
    (packages / "aiter").mkdir()
    (packages / "aiter" / "__init__.py").write_text("raise SystemExit('it must not even be imported')")
    assert "unrelated package" in reason()


@pytest.mark.parametrize("version", ["0.1.7.post2.dev18", "0.1.16.post2", "0.1.16", "0.1.17.dev3+g1a2b3c", "0.1.17rc1"])
def test_an_aiter_that_reads_wrong_blocks(packages: Path, version: str) -> None:
    install(packages, **{"_version.py": f"__version__ = {version!r}"})
    assert f"aiter {version} is too old: v0.1.17" in reason()


@pytest.mark.parametrize(
    ("version", "counts_as"),
    [
        ("0.1.17", (0, 1, 17)),
        ("0.1.20.post2.dev38+g1a2b3c", (0, 1, 20)),
        ("0.1.23.dev88+gb3eed3fd4", (0, 1, 22)),
        ("0.1.26+rocm7.2", (0, 1, 26)),
    ],
)
def test_a_build_on_the_way_to_a_version_counts_as_the_one_before(
    packages: Path, version: str, counts_as: tuple[int, ...]
) -> None:
    install(packages, **{"_version.py": f"__version__ = {version!r}"})
    assert aiter.load().version == counts_as


def test_an_aiter_without_a_version(packages: Path) -> None:
    install(packages, **{"_version.py": "__version__ = 'unknown'"})
    assert "does not say its version" in reason()


def test_a_machine_without_rocm(packages: Path) -> None:
    install(packages, **{"__init__.py": "raise RuntimeError('ROCm version file not found\\nand more')"})
    assert reason() == "aiter cannot be imported: RuntimeError: ROCm version file not found"


def test_an_aiter_of_triton_kernels_alone(packages: Path) -> None:
    install(packages, **{"__init__.py": ""})
    assert "AITER_TRITON_ONLY" in reason()


def test_named_platforms_need_no_device() -> None:
    units = {name: platform.compute_units for name, platform in NAMED_PLATFORMS.items()}
    assert (units["mi300x"], units["mi355x"], units["mi308x"], units["h100"]) == (304, 256, 80, 132)
    assert NAMED_PLATFORMS["mi300x"].arch == "gfx942"
    assert NAMED_PLATFORMS["mi355x"].arch == "gfx950"
    assert all(platform.aiter_version for platform in NAMED_PLATFORMS.values() if platform.arch.startswith("gfx"))


def test_aiter_that_is_not_wanted_is_as_good_as_none_but_says_so() -> None:
    assert NAMED_PLATFORMS["mi300x"].without_aiter().aiter_version is None
    assert "--no-aiter" in str(NAMED_PLATFORMS["mi300x"].without_aiter().aiter_unavailable)
    assert NAMED_PLATFORMS["h100"].without_aiter() == NAMED_PLATFORMS["h100"]


def test_this_machine_is_a_cpu_where_a_cpu_is_asked_for() -> None:
    platform = detect_platform(torch.device("cpu"), torch.float32)
    assert (platform.arch, platform.fastest_layout) == ("cpu", None)
    assert platform.aiter_unavailable
    assert platform.triton_unavailable
