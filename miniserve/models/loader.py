"""Fill a model's parameters from safetensors files, or with random numbers.

Layers are filled one after the other: each gets its memory, has its pieces of the checkpoint copied straight into it,
and is put into its final form before the next begins. So there is never a second copy of the model.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from miniserve.core import UserError
from miniserve.models.decoder import CausalLM
from miniserve.models.kv_scales import is_kv_scale
from miniserve.models.layers.base import Layer, Piece

Progress = Callable[[int, int], None]

# Stored by old checkpoints; the model computes it.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_FLOATS = ("BF16", "F16", "F32")
_SHOWN = 5
_AT_ONCE = 1 << 28  # values


def load_weights(model: CausalLM, path: str | Path, *, progress: Progress = lambda done, total: None) -> None:
    """Load `path`/*.safetensors (one file or sharded with an index) into `model`, converting to its dtype.

    progress(done, total) is called after each layer, in bytes of the model's parameters. Of tensors the model does not
    want, only these are ignored: rotary_emb.inv_freq, lm_head.weight where the embeddings are tied, layers after the
    last that guess further tokens, and scales for an fp8 KV cache (`read_kv_scales`). Raises `UserError` naming every
    tensor that is missing, surplus, mis-shaped or not stored as bfloat16, float16 or float32, before anything is read,
    and for NaN and infinite values, as which large ones end in float16.
    """
    files = _tensor_files(Path(path))
    _check(model, files, Path(path))
    for layer, pieces in _in_order(model, progress):
        for file, within in _by_file(pieces, files):
            # Opened anew for each layer: pages that stay mapped would count as this process's memory.
            with _opened(file) as tensors:
                for name in within:
                    layer.target(pieces[name]).copy_(tensors.get_tensor(name))
        _check_values(layer, pieces, Path(path))


def read_kv_scales(model: CausalLM, path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of `path`/*.safetensors that are scales for an fp8 KV cache, by name."""
    scales: dict[str, torch.Tensor] = {}
    files = _tensor_files(Path(path))
    for file, names in _by_file([name for name in files if is_kv_scale(name, model.config.num_layers)], files):
        with _opened(file) as tensors:
            scales |= {name: tensors.get_tensor(name) for name in names}
    return scales


def dummy_weights(model: CausalLM, seed: int, *, progress: Progress = lambda done, total: None) -> None:
    """Random weights of the right shapes: normal with standard deviation 0.02, norms 1. The same seed on the same
    device gives the same weights."""
    generator = torch.Generator(device=model.options.device).manual_seed(seed)
    for layer, _ in _in_order(model, progress):
        layer.fill_dummy(generator)


def _in_order(model: CausalLM, progress: Progress) -> Iterator[tuple[Layer, dict[str, Piece]]]:
    """Yield each layer with its memory, to be filled, and its pieces by name; finish it when the caller comes back."""
    layers = list(_layers(model))
    total = sum(_bytes(layer) for _, layer in layers)
    done = 0
    for name, layer in layers:
        size = _bytes(layer)
        layer.allocate(model.options.device)
        yield layer, {piece.name: piece for piece in layer.pieces(name)}
        layer.finish()
        done += size
        progress(done, total)


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            yield name, module


def _bytes(layer: Layer) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters(recurse=False))


# --- the checkpoint's files ------------------------------------------------------------------------------------------


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor."""
    files: dict[str, Path] = {}
    for file in _weight_files(path):
        with _opened(file) as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    return files


def _by_file(names: Iterable[str], files: dict[str, Path]) -> list[tuple[Path, list[str]]]:
    found: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        found[files[name]].append(name)
    return sorted(found.items())


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} cannot be read ({error}); download the model again.") from error
        if absent := [name for name in names if not (path / name).is_file()]:
            raise UserError(f"{path} lacks {_some(absent)}, which its index names; download the model again.")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if list(path.glob("pytorch_model*.bin")):
        raise UserError(f"{path} has its weights as .bin files only; safetensors are supported: convert them.")
    raise UserError(
        f"{path} has neither model.safetensors nor model.safetensors.index.json; is it a model's directory?"
    )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); download it again.") from error


def _check(model: CausalLM, files: dict[str, Path], path: Path) -> None:
    """Compare names, shapes and dtypes, which the files' headers tell."""
    wanted = {piece.name: piece for name, layer in _layers(model) for piece in layer.pieces(name)}
    surplus = [name for name in files if name not in wanted and not _ignored(name, model)]
    problems = []
    if missing := [name for name in wanted if name not in files]:
        problems.append(f"missing: {_some(missing)}")
    if surplus:
        problems.append(f"not part of this architecture: {_some(surplus)}")
    wrong = []
    for file, names in _by_file([name for name in wanted if name in files], files):
        with _opened(file) as tensors:
            for name in names:
                wrong += _wrong(wanted[name], tensors.get_slice(name))
    if wrong:
        problems.append(_some(wrong))
    if problems:
        raise UserError(f"The weights in {path} do not fit {model.config.architecture}: {'; '.join(problems)}.")


def _wrong(piece: Piece, header: Any) -> list[str]:
    shape, dtype = list(header.get_shape()), header.get_dtype()
    if shape != list(piece.shape):
        return [f"{piece.name} has shape {shape}, config.json asks for {list(piece.shape)}"]
    if dtype not in _FLOATS:
        return [f"{piece.name} is stored as {dtype}, supported are {', '.join(_FLOATS)}"]
    return []


def _check_values(layer: Layer, pieces: dict[str, Piece], path: Path) -> None:
    parameters = list(layer.parameters(recurse=False))
    if all(map(_finite, parameters)):
        return
    broken = [name for name, piece in pieces.items() if not _finite(layer.target(piece))]
    remedy = "download the model again"
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        remedy = f"use --dtype bfloat16, as float16 ends at 65504, or {remedy}"
    raise UserError(f"The weights in {path} have NaN or infinite values: {_some(broken)}; {remedy}.")


def _finite(x: torch.Tensor) -> bool:
    """Without a copy of x. Of a part that has a NaN both ends are NaN."""
    return all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in x.flatten().split(_AT_ONCE))


def _ignored(name: str, model: CausalLM) -> bool:
    config = model.config
    drafts = tuple(f"model.layers.{config.num_layers + i}." for i in range(config.num_draft_layers))
    return (
        name.endswith(_IGNORED_SUFFIX)
        or (name == "lm_head.weight" and config.tie_word_embeddings)
        or name.startswith(drafts)
        or is_kv_scale(name, config.num_layers)
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
