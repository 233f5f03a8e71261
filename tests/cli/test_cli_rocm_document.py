"""docs/ROCM.md says of the paths what their contracts say, of the kernels what was compiled, and of the commands what
there is."""

from __future__ import annotations

import re
from pathlib import Path

import cli_terminal as cli
import pytest
from rocm_document import DOCUMENT, compiled_rows, renewed

import miniserve
from miniserve.attention.contracts import CONTRACTS


def test_its_tables_are_those_of_the_contracts() -> None:
    text = DOCUMENT.read_text()
    assert renewed(text) == text, "run tests/cli/rocm_document.py"


def test_it_names_every_backend_and_commands_that_exist() -> None:
    text = DOCUMENT.read_text()
    assert all(f"| `{contract.name}` |" in text for contract in CONTRACTS)
    for command in ("explain", "check", "tune"):
        assert f"miniserve {command} MODEL" in text
        assert cli.run(command, "--help").returncode == 0


def test_what_was_compiled_are_the_kernels_that_there_are() -> None:
    pytest.importorskip("triton")
    from miniserve.kernels.triton.compile_check import ARCHS, cases

    rows, text = compiled_rows(), DOCUMENT.read_text()
    different = len({tuple(row[:3]) for row in rows})
    assert f"compiled {len(rows)} configurations, {different} different kernels: none spills" in text
    assert not [row for row in rows if row[5] != "0" or row[8]]
    sources = (Path(miniserve.__file__).parent / "kernels" / "triton").glob("*.py")
    kernels = {name for path in sources for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.M)}
    nvidias_alone = {"linearize", "medium_linear", "norm_router", "router"}
    for arch in ("gfx942", "gfx950"):
        assert {row[1] for row in rows if row[0] == arch} == kernels - nvidias_alone
        compiled, known = {row[2] for row in rows if row[0] == arch}, {name for name, _ in cases(ARCHS[arch])}
        assert compiled <= known
        assert known - compiled <= {"bf16 64 rows 1024 x 2048"}, "which the vendor's library multiplies"
