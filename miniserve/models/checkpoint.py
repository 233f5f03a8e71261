"""A checkpoint's files: its JSON, which of its weight files are loaded, which tensor is in which. No torch."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from miniserve.core import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # tensors that may be tied
_SHOWN = 5
_ROWS = 4096
_SIZE_BYTES = 8  # a safetensors file begins with its header's size


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold a model's weights, chosen as transformers chooses them: model.safetensors, else those that
    the index names. absent: the ones of them that are not there. passed_over: names of other weights in the directory,
    none of which is read."""

    loaded: tuple[Path, ...]
    absent: tuple[str, ...]
    passed_over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, row-major. dtype: as safetensors names it. begin: its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's file; a whole number is an int however it is written, as JSON has one kind of number.
    Raises `UserError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=_number)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): fetch the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: fetch the model again.")
    return content


def find_weights(path: Path) -> WeightFiles:
    """Of the directory `path`, which may have none."""
    names = [SINGLE] if (path / SINGLE).is_file() else _indexed(path / INDEX)
    read = {*names, INDEX} if SINGLE not in names else {SINGLE}
    return WeightFiles(
        loaded=tuple(path / name for name in names),
        absent=tuple(name for name in names if not (path / name).is_file()),
        passed_over=tuple(sorted(file.name for file in path.glob("*.safetensors*") if file.name not in read)),
    )


def require_weights(path: Path, name: str) -> WeightFiles:
    """As `find_weights`. Raises `UserError` where nothing can be loaded of the model called `name`, with why."""
    found = find_weights(path)
    if found.absent:
        raise UserError(
            f"{name} lacks {len(found.absent)} of the {len(found.loaded)} weight files that {INDEX} names: "
            f"{some(found.absent)}; fetch it again, the download seems to have stopped halfway."
        )
    if not found.loaded:
        other = f" (it has {some(found.passed_over)})" if found.passed_over else ""
        raise UserError(
            f"{name} has neither {SINGLE} nor {INDEX}{other}: convert its weights to {SINGLE}, "
            f"or take --load-format dummy for random weights.{other_formats(path)}"
        )
    return found


def other_formats(path: Path) -> str:
    """A sentence on files in a model's directory that hold weights in a form that is not loaded, or nothing."""
    found = {file.suffix for file in path.iterdir() if file.is_file()}
    if ".gguf" in found:
        return " GGUF files are not supported."
    if found & {".bin", ".pth", ".pt"}:
        return " It holds pickled PyTorch weights (.bin, .pt or .pth), which are not loaded because they can run code."
    return ""


def find_tensors(files: Iterable[Path]) -> dict[str, list[StoredTensor]]:
    """Each tensor of the files, by name, as their headers describe it. Of several the last is loaded, as transformers
    does. Raises `UserError` for a file that is shorter or longer than its header says."""
    found: dict[str, list[StoredTensor]] = defaultdict(list)
    for file in files:
        with opened(file), file.open("rb") as content:  # `opened` checks the header
            size = int.from_bytes(content.read(_SIZE_BYTES), "little")
            header = json.loads(content.read(size))
        header.pop("__metadata__", None)
        for name, each in header.items():
            begin = _SIZE_BYTES + size + each["data_offsets"][0]
            found[name].append(StoredTensor(file, each["dtype"], tuple(each["shape"]), begin))
    return dict(found)


def by_file(names: Iterable[str], tensors: dict[str, list[StoredTensor]]) -> list[tuple[Path, list[str]]]:
    """tensors: as of `find_tensors`."""
    found: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        found[tensors[name][-1].file].append(name)
    return sorted(found.items())


def differ(first: str, second: str, tensors: dict[str, list[StoredTensor]]) -> bool:
    """Whether two tensors have another shape or other values, however stored. tensors: as of `find_tensors`."""
    shape = tensors[first][-1].shape
    if shape != tensors[second][-1].shape:
        return True
    with opened(tensors[first][-1].file) as some_file, opened(tensors[second][-1].file) as other_file:
        one, other = some_file.get_slice(first), other_file.get_slice(second)
        # Some rows after the other, so that neither is in memory as a whole.
        starts = range(0, [*shape, 0][0], _ROWS)
        return any(not one[at : at + _ROWS].float().equal(other[at : at + _ROWS].float()) for at in starts)


def describe_weights(found: WeightFiles, tensors: dict[str, list[StoredTensor]]) -> list[str]:
    """What users should know of the choice, a sentence each, where there was one. tensors: as of `find_tensors`."""
    notes = []
    if found.passed_over:
        chosen = SINGLE if found.loaded[0].name == SINGLE else f"the files that {INDEX} names"
        notes.append(f"weights: {chosen}; passed over: {some(found.passed_over)}")
    if repeated := [name for name, where in tensors.items() if len(where) > 1]:
        notes.append(f"weights: of tensors that several files have the last file's is loaded: {some(repeated)}")
    return notes


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file, mapped."""
    with readable(file), safe_open(str(file), framework="pt") as tensors:
        yield tensors


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns errors of reading the file into `UserError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); download it again.") from error


def some(names: Iterable[str]) -> str:
    """The first few of them, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _indexed(index: Path) -> list[str]:
    if not index.is_file():
        return []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} names no files in its weight_map: fetch the model again.")
    return sorted({str(name) for name in shards.values()})
