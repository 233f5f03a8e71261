"""Make an 8-bit checkpoint of a small bfloat16 one, in each of the forms that people publish:

    python -m tools.quantise fp8-block miniserve/assets/tiny-qwen3 /tmp/tiny-qwen3-fp8

Scales are those of the largest value that they cover, as llm-compressor's and Quark's without calibration data; the
scales of inputs and of the KV cache are made up.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniserve.models.checkpoint import SINGLE

CODES = torch.float8_e4m3fn
LARGEST = 448.0
KV_SCALE = 0.25


@dataclass(frozen=True, slots=True)
class Kind:
    """config: the checkpoint's quantization_config. grain: "tensor", "rows", "blocks" of `block`. scale: the scales'
    name; shape: that of a tensor's single one. static: with scales of inputs; kv: and of the KV cache."""

    config: dict[str, Any]
    grain: str
    scale: str = "weight_scale"
    block: tuple[int, int] = (128, 128)
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    static: bool = False
    kv: bool = False


def _compressed(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    both = {"weights": eight | {"dynamic": False} | weights, "input_activations": eight | inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"]} | both},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _quark(qscheme: str, *, dynamic: bool, kv: bool) -> dict[str, Any]:
    axis = None if qscheme == "per_tensor" else 0
    eight = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": qscheme, "ch_axis": axis}
    inputs = {"dtype": "fp8_e4m3", "is_dynamic": dynamic, "qscheme": "per_tensor" if not dynamic else "per_channel"}
    layer = {"weight": eight, "input_tensors": inputs, "output_tensors": None, "bias": None}
    cache = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor"}
    group = ["*k_proj", "*v_proj"] if kv else []
    return {
        "quant_method": "quark",
        "global_quant_config": layer,
        "layer_quant_config": {pattern: layer | {"output_tensors": cache} for pattern in group},
        "layer_type_quant_config": {},
        "exclude": ["lm_head", "*.mlp.gate"],
        "export": {"kv_cache_group": group, "weight_format": "real_quantized"},
    }


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}
KINDS = {
    "fp8-block": Kind(
        _FP8 | {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "blocks", "weight_scale_inv"
    ),
    "fp8-ue8m0": Kind(
        _FP8 | {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        "blocks",
        "weight_scale_inv",
        dtype=torch.float8_e8m0fnu,
    ),
    "fp8-tensor": Kind(_FP8 | {"activation_scheme": "static"}, "tensor", static=True),
    "compressed-dynamic": Kind(
        _compressed({"strategy": "channel"}, {"strategy": "token", "dynamic": True}), "rows", dtype=torch.bfloat16
    ),
    "compressed-static": Kind(
        _compressed({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        "tensor",
        shape=(1,),
        static=True,
    ),
    "compressed-block": Kind(
        _compressed(
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        "blocks",
    ),
    "quark-kv": Kind(_quark("per_tensor", dynamic=False, kv=True), "tensor", static=True, kv=True),
    "quark-channel": Kind(_quark("per_channel", dynamic=True, kv=False), "rows"),
}


def quantise(kind: Kind, source: Path, target: Path) -> None:
    """Write the checkpoint `source`, of one file, to the directory `target` in 8 bits."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / SINGLE)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found |= dict(_quantised(name.removesuffix(".weight"), tensor, kind)) if is_product(name) else {name: tensor}
    save_file(found, target / SINGLE)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": kind.config}, indent=1))


def is_product(name: str) -> bool:
    """Whether a tensor is the matrix of a linear layer that these checkpoints have in 8 bits."""
    return name.endswith(".weight") and "_proj" in name


def _quantised(module: str, weight: Tensor, kind: Kind) -> Iterator[tuple[str, Tensor]]:
    powers = kind.dtype == torch.float8_e8m0fnu
    codes, scale = quantised(weight.float(), kind.grain, kind.block, powers=powers)
    yield f"{module}.weight", codes
    if kind.grain != "blocks":
        scale = scale.reshape(kind.shape if kind.grain == "tensor" else (-1, 1))
    yield f"{module}.{kind.scale}", scale.to(kind.dtype)
    if kind.static:
        yield f"{module}.input_scale", torch.full(kind.shape, 0.05)
    if kind.kv and module.endswith(("k_proj", "v_proj")):
        yield f"{module}.output_scale", torch.tensor(KV_SCALE)


def quantised(weight: Tensor, grain: str, block: tuple[int, int], *, powers: bool = False) -> tuple[Tensor, Tensor]:
    """float32 [n, k] -> codes, and scales: one for all, [n], or one for each block; powers: of two."""
    rows, columns = weight.shape
    n, k = {"tensor": (rows, columns), "rows": (1, columns), "blocks": block}[grain]
    padded = torch.nn.functional.pad(weight, (0, -columns % k, 0, -rows % n))
    blocks = padded.unflatten(1, (-1, k)).unflatten(0, (-1, n))
    scale = (blocks.abs().amax((1, 3)) / LARGEST).clamp(min=1e-12)
    if powers:
        scale = scale.log2().ceil().exp2()
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.to(CODES).contiguous(), scale if grain == "blocks" else scale.flatten()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    quantise(KINDS[given.kind], given.source, given.target)
