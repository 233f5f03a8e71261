"""docs/ROCM.md says of the paths what their contracts say, of the kernels what was compiled, and of the commands what
there is."""

from __future__ import annotations

import re
from pathlib import Path

import cli_terminal as cli
from rocm_document import DOCUMENT, renewed

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
    """The table that `tools/compile_check.py` printed."""
    text = DOCUMENT.read_text()
    rows = re.findall(r"^\| (gfx\d+) \| (\w+) \| (\d+) \| \d+ \| (\d+) \|", text, re.MULTILINE)
    assert f"compiled {sum(int(count) for _, _, count, _ in rows)} configurations" in text and "none spills" in text
    assert not [row for row in rows if row[3] != "0"]
    sources = (Path(miniserve.__file__).parent / "kernels" / "triton").glob("*.py")
    kernels = {name for path in sources for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.M)}
    nvidias_alone = {
        "head_linear", "hopper_extend", "hopper_mla", "large_linear", "linearize", "medium_linear", "norm_router",
        "round", "router", "sort",
    }  # fmt: skip
    for arch in ("gfx942", "gfx950"):
        assert {kernel for found, kernel, _, _ in rows if found == arch} == kernels - nvidias_alone
