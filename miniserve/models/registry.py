"""From a description to a model without weights, and what its weights will take."""

from __future__ import annotations

import torch

from miniserve.core import UserError
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.layers.base import Layer
from miniserve.models.layers.experts import Experts
from miniserve.models.layers.latent_attention import UpProjection
from miniserve.models.layers.linear import Linear, can_pack
from miniserve.models.options import BuildOptions
from miniserve.parallel.group import Alone
from miniserve.parallel.shard import Shard

# Bytes of an element of linear layers and of routed experts, by the way a model is quantised; None: of its dtype. MXFP4
# has four bits, and a scale of eight for 32 of them.
STORED_SIZES: dict[str | None, tuple[float | None, float | None]] = {
    None: (None, None),
    "fp8": (1, 1),
    "quark": (1, 1),
    "compressed-tensors": (1, 1),
    "mxfp4": (None, 0.5 + 1 / 32),
}


def build_model(config: ModelConfig, options: BuildOptions) -> CausalLM:
    """Make the model with its parameters on the meta device; `loader` gives them memory on `options.device`. Raises
    `UserError` where the model cannot reach `options.max_model_len`, or has not something for each rank."""
    if (options.max_model_len or 0) > config.max_position_embeddings:
        raise UserError(_too_long(config, options.max_model_len or 0))
    most = config.most_ranks(expert_parallel=options.expert_parallel)
    if options.group.size > most:
        raise UserError(f"{config.architecture} of this size can be shared by {most} ranks, not {options.group.size}.")
    return CausalLM(config, options).eval()


def weight_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    shard: Shard | None = None,
    *,
    expert_parallel: bool = False,
) -> int:
    """Bytes that the loaded weights of a shard occupy on `device`, a tied head's packed copy included (it exists on a
    CPU). How they are quantised must be one of `STORED_SIZES`; scales of single matrices are not counted."""
    options = BuildOptions(
        dtype=dtype,
        kv_dtype=dtype,
        device=torch.device("meta"),
        max_model_len=1,
        group=Alone() if shard is None else Alone(shard.rank, shard.size),
        expert_parallel=expert_parallel,
    )
    model = CausalLM(config, options)
    linear, expert = STORED_SIZES[config.quantization]
    sizes: dict[type, float | None] = {Linear: linear, UpProjection: linear, Experts: expert}
    count = 0
    for layer in model.modules():
        if isinstance(layer, Layer):
            size = None if layer is model.lm_head else sizes.get(type(layer))
            weights = layer.parameters(recurse=False)
            count += sum(each.nbytes if size is None else int(each.numel() * size) for each in weights)
    if config.tie_word_embeddings and torch.device(device).type == "cpu" and can_pack(dtype):
        count += model.lm_head.out_features * config.hidden_size * dtype.itemsize
    return count


def _too_long(config: ModelConfig, length: int) -> str:
    limit = config.max_position_embeddings
    if config.rope.rope_type == "dynamic":
        return (
            f"--max-model-len {length} is above this model's {limit} tokens; its 'dynamic' rope scaling changes with "
            f"each sequence's length beyond that and is supported up to {limit}. Use --max-model-len {limit} or less."
        )
    return f"--max-model-len {length} is above this model's longest context; use --max-model-len {limit} or less."
