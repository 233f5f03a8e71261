"""From a description to a model without weights, and what its weights will take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miniserve.attention.aiter import AiterExperts
from miniserve.core import UserError
from miniserve.kernels.native import NativeKernels
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.layers.linear import can_pack
from miniserve.models.options import BuildOptions

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device | str,
    max_model_len: int | None = None,
    native: NativeKernels | None = None,
    triton: TritonKernels | None = None,
    experts: AiterExperts | None = None,
) -> CausalLM:
    """Make the model with its parameters on the meta device; `loader` gives them memory on `device`.

    max_model_len: positions the rotary table covers, in tokens (default: all the model has). native: the CPU's kernels,
    triton: the GPU's, experts: aiter's of an AMD GPU, None to do without. Raises `UserError` where the model cannot
    reach that far.
    """
    length = config.max_position_embeddings if max_model_len is None else max_model_len
    if length > config.max_position_embeddings:
        raise UserError(_too_long(config, length))
    options = BuildOptions(
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=torch.device(device),
        max_model_len=length,
        native=native,
        triton=triton,
        experts=experts,
    )
    return CausalLM(config, options).eval()


def weight_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> int:
    """Bytes that the loaded weights occupy on `device`, a tied head's packed copy included (it exists on a CPU)."""
    options = BuildOptions(dtype=dtype, kv_dtype=dtype, device=torch.device("meta"), max_model_len=1)
    model = CausalLM(config, options)
    count = sum(parameter.nbytes for parameter in model.parameters())
    if config.tie_word_embeddings and torch.device(device).type == "cpu" and can_pack(dtype):
        count += config.vocab_size * config.hidden_size * dtype.itemsize
    return count


def _too_long(config: ModelConfig, length: int) -> str:
    limit = config.max_position_embeddings
    if config.rope.rope_type == "dynamic":
        return (
            f"--max-model-len {length} is above this model's {limit} tokens; its 'dynamic' rope scaling changes with "
            f"each sequence's length beyond that and is supported up to {limit}. Use --max-model-len {limit} or less."
        )
    return f"--max-model-len {length} is above this model's longest context; use --max-model-len {limit} or less."
