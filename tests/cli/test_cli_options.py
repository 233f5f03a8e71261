"""Numbers as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.cli.settings import parse_bytes, parse_count
from miniserve.core import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("8k", 8000), ("8K", 8192), ("8Ki", 8192), ("1.5k", 1500), ("2M", 2 << 20), (" 16 ", 16)],
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text, "--max-model-len") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, 1 << 32) for text in ("4294967296", "4G", "4g", "4GiB", "4gb")),
        *((text, 512 << 20) for text in ("512M", "0.5G", "512 MiB")),
        ("1T", 1 << 40),
        ("3kB", 3072),
        ("7b", 7),
    ],
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text, "--kv-cache-memory") == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "8 8", "8q", "k", "1e3", "8kK", "٣", "nan"])
def test_what_is_no_number_is_refused_with_the_flag(text: str) -> None:
    for parse in (parse_count, parse_bytes):
        with pytest.raises(UserError, match="--flag must be a"):
            parse(text, "--flag")


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 2**53), st.sampled_from(["", "k", "K", "m", "M"]))
def test_whole_numbers_are_exact(number: int, suffix: str) -> None:
    unit = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}[suffix]
    assert parse_count(f"{number}{suffix}", "--flag") == number * unit
