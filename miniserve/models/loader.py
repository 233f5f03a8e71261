"""Fill a model's parameters from safetensors files, or with random numbers.

Layers are filled one after the other: each gets its memory, has its pieces of the checkpoint copied straight into it,
and is put into its final form before the next begins. So there is never a second copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import torch
from torch import nn

from miniserve.core import UserError
from miniserve.models.checkpoint import (
    EMBEDDING,
    HEAD,
    StoredTensor,
    by_file,
    find_tensors,
    opened,
    require_weights,
    some,
)
from miniserve.models.decoder import CausalLM
from miniserve.models.kv_scales import is_kv_scale
from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.experts import Experts
from miniserve.models.tensor_reader import TensorReader

Progress = Callable[[int, int], None]

# Stored by old checkpoints; the model computes it.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
# Dtypes that a tensor may be stored in, by the kind of its `Piece`.
_FLOATS = ("BF16", "F16", "F32")
_STORED = {"values": _FLOATS, "codes": ("F8_E4M3",), "scales": (*_FLOATS, "F8_E8M0")}
_NAN_CODE = 0x7F  # of float8_e4m3fn, without its sign
_AT_ONCE = 1 << 28  # values


def load_weights(model: CausalLM, path: str | Path, *, progress: Progress = lambda done, total: None) -> None:
    """Load the weight files of `path` (`find_weights` says which) into `model`, converting to its dtype.

    progress(done, total) is called after each layer, in bytes of the model's parameters. Of tensors the model does not
    want, only these are ignored: rotary_emb.inv_freq, lm_head.weight where the embeddings are tied (then it equals
    them, see `load_model_config`), layers after the last that guess further tokens, scales for an fp8 KV cache
    (`read_kv_scales`) and those of inputs that a quantised checkpoint says it has. Raises `UserError` naming every
    tensor that is missing, surplus, mis-shaped or stored in another dtype than config.json's quantisation asks for
    (bfloat16, float16 or float32 where it asks for none), before anything is read, and for NaN and infinite values, as
    which large ones end in float16.
    """
    stored = find_tensors(require_weights(Path(path), str(path)).loaded)
    wanted = {name: _pieces(model, name, layer, stored) for name, layer in _layers(model)}
    _check(model, wanted, stored, Path(path))
    reader = TensorReader(model.options.device)
    for name, layer in _in_order(model, progress):
        pieces = wanted.pop(name)
        for file, within in by_file(pieces, stored):
            with reader.opened(file):
                for tensor in within:
                    for piece in pieces[tensor]:
                        _read(reader, stored[tensor][-1], piece, layer.target(piece))
        _check_values(layer, pieces, Path(path))


def read_kv_scales(model: CausalLM, path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of `path`'s weight files that are scales for an fp8 KV cache, by name."""
    scales: dict[str, torch.Tensor] = {}
    stored = find_tensors(require_weights(Path(path), str(path)).loaded)
    for file, names in by_file([name for name in stored if is_kv_scale(name, model.config.num_layers)], stored):
        with opened(file) as tensors:
            scales |= {name: tensors.get_tensor(name) for name in names}
    return scales


def dummy_weights(model: CausalLM, seed: int, *, progress: Progress = lambda done, total: None) -> None:
    """Random weights of the right shapes: normal with standard deviation 0.02, norms 1. The same seed on the same
    kind of device gives the same weights, whatever part of them `model` is."""
    for name, layer in _in_order(model, progress):
        layer.fill_dummy(name, seed)


def _read(reader: TensorReader, stored: StoredTensor, piece: Piece, target: torch.Tensor) -> None:
    """Copy what is wanted of a tensor, and read no more of its file than that."""
    if not target.numel():
        return
    if piece.refine is None:
        reader.copy(stored, piece.source, target)
        return
    scales = torch.empty(stored.shape)
    reader.copy(stored, (), scales)
    target.copy_(piece.refine(scales.reshape(piece.shape)))


def _in_order(model: CausalLM, progress: Progress) -> Iterator[tuple[str, Layer]]:
    """Yield each layer by name, with its memory, to be filled; finish it when the caller comes back."""
    layers = list(_layers(model))
    total = sum(_bytes(layer) for _, layer in layers)
    done = 0
    for name, layer in layers:
        size = _bytes(layer)
        layer.allocate(model.options.device)
        yield name, layer
        layer.finish()
        done += size
        progress(done, total)


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            yield name, module


def _pieces(model: CausalLM, name: str, layer: Layer, stored: Container[str]) -> dict[str, list[Piece]]:
    """What the layer wants of a checkpoint that has the tensors `stored`, by tensor: transformers also writes experts
    stacked, and reads embeddings that are stored as the head alone they are tied to."""
    pieces = list(layer.pieces(name))
    if isinstance(layer, Experts) and any(piece.name in stored for piece in layer.stacked_pieces(name)):
        pieces = list(layer.stacked_pieces(name))
    if model.config.tie_word_embeddings and EMBEDDING not in stored and HEAD in stored:
        pieces = [dataclasses.replace(piece, name=HEAD) if piece.name == EMBEDDING else piece for piece in pieces]
    wanted: dict[str, list[Piece]] = {}
    for piece in pieces:
        wanted.setdefault(piece.name, []).append(piece)
    return wanted


def _bytes(layer: Layer) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters(recurse=False))


def _check(
    model: CausalLM, layers: dict[str, dict[str, list[Piece]]], stored: dict[str, list[StoredTensor]], path: Path
) -> None:
    """Compare names, shapes and dtypes, which the files' headers tell. layers: what each wants, by tensor."""
    wanted = {tensor: pieces[0] for layer in layers.values() for tensor, pieces in layer.items()}
    missing = [name for name in wanted if name not in stored]
    surplus = [name for name in stored if name not in wanted and not _ignored(name, model)]
    wrong = [what for name in wanted if name in stored for what in _wrong(wanted[name], stored[name][-1])]
    found = {"missing: ": missing, "not part of this architecture: ": surplus, "": wrong}
    if problems := [what + some(names) for what, names in found.items() if names]:
        raise UserError(f"The weights in {path} do not fit {model.config.architecture}: {'; '.join(problems)}.")


def _wrong(piece: Piece, found: StoredTensor) -> list[str]:
    shape, dtype = list(found.shape), found.dtype
    if shape != list(piece.shape) and not (piece.kind == "scales" and shape == [*piece.shape, 1]):
        return [f"{piece.name} has shape {shape}, config.json asks for {list(piece.shape)}"]
    if dtype not in (stored := _STORED[piece.kind]):
        asked = "supported are" if piece.kind == "values" else "its quantization_config asks for"
        return [f"{piece.name} is stored as {dtype}, {asked} {', '.join(stored)}"]
    return []


def _check_values(layer: Layer, pieces: dict[str, list[Piece]], path: Path) -> None:
    parameters = list(layer.parameters(recurse=False))
    if all(map(_finite, parameters)):
        return
    broken = [name for name, each in pieces.items() if not all(_finite(layer.target(piece)) for piece in each)]
    remedy = "download the model again"
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        remedy = f"use --dtype bfloat16, as float16 ends at 65504, or {remedy}"
    raise UserError(f"The weights in {path} have NaN or infinite values: {some(broken)}; {remedy}.")


def _finite(x: torch.Tensor) -> bool:
    """Without a copy of x. Of a part that has a NaN both ends are NaN."""
    parts = x.flatten().split(_AT_ONCE) if x.numel() else ()
    if x.dtype == torch.float8_e4m3fn:  # which has no infinity, and of which no ends can be taken
        return all(bool((part.view(torch.uint8).bitwise_and(_NAN_CODE) != _NAN_CODE).all()) for part in parts)
    return all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in parts)


def _ignored(name: str, model: CausalLM) -> bool:
    config = model.config
    drafts = tuple(f"model.layers.{config.num_layers + i}." for i in range(config.num_draft_layers))
    return (
        name.endswith(_IGNORED_SUFFIX)
        or (name == HEAD and config.tie_word_embeddings)
        or name.startswith(drafts)
        or is_kv_scale(name, config.num_layers)
        or (config.quantization is not None and config.quantization.leaves_out(name))
    )
