"""docs/ROCM.md says of the paths what their contracts say, and of the commands what there is."""

from __future__ import annotations

import cli_terminal as cli
from rocm_document import DOCUMENT, renewed

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
