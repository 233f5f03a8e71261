"""docs/SCALE.md says what `explain` says, and names flags and files that exist."""

from __future__ import annotations

import re
from dataclasses import fields

from scale_document import DOCUMENT, renewed

from miniserve.config import EngineConfig


def test_its_table_is_what_explain_says() -> None:
    text = DOCUMENT.read_text()
    assert renewed(text) == text, "run tests/cli/scale_document.py"


def test_it_names_flags_and_files_that_exist() -> None:
    text = DOCUMENT.read_text()
    known = {f"--{field.name.replace('_', '-')}" for field in fields(EngineConfig)} | {"--device"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (DOCUMENT.parent / link).exists(), link
