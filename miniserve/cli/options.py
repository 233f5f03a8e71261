"""How numbers are written on the command line: `8k` tokens, `4G` bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from miniserve.core import UserError

_COUNTS = {"": 1, "k": 10**3, "K": 2**10, "Ki": 2**10, "m": 10**6, "M": 2**20, "Mi": 2**20}
_BYTES = {"": 1, "b": 1} | {
    prefix + ending: 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1) for ending in ("", "b", "i", "ib")
}


def parse_count(text: str, flag: str) -> int:
    """A number of tokens or sequences: `8192`, `8k` (8,000), `8K` or `8Ki` (8,192). Raises `UserError`."""
    return _scaled(text, _COUNTS, f"{flag} must be a whole number such as 8192, 8k (8000) or 8K (8192), not {text!r}.")


def parse_bytes(text: str, flag: str) -> int:
    """A size, its suffixes powers of 1024 in either case: `4294967296`, `4G`, `4GiB`, `512m`. Raises `UserError`."""
    return _scaled(text.lower(), _BYTES, f"{flag} must be a size in bytes such as 512M or 4G, not {text!r}.")


def _scaled(text: str, units: Mapping[str, int], message: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip(), flags=re.ASCII)
    if match is None or match[2] not in units:
        raise UserError(message)
    number = Fraction(match[1]) * units[match[2]]
    if number.denominator != 1:
        raise UserError(message)
    return int(number)
