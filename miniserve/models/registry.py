"""From a description to a model without weights, and what its weights will take."""

from __future__ import annotations

import torch

from miniserve.core import UserError
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.layers.linear import can_pack
from miniserve.models.options import BuildOptions


def build_model(config: ModelConfig, options: BuildOptions) -> CausalLM:
    """Make the model with its parameters on the meta device; `loader` gives them memory on `options.device`. Raises
    `UserError` where the model cannot reach `options.max_model_len`."""
    if (options.max_model_len or 0) > config.max_position_embeddings:
        raise UserError(_too_long(config, options.max_model_len or 0))
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
