"""From a description to a model without weights, and what its weights will take."""

from __future__ import annotations

import torch

from miniserve.attention.platform import Platform
from miniserve.core import UserError
from miniserve.kernels import native
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.layers.contracts import TRITON_ROUTER
from miniserve.models.layers.experts import Experts
from miniserve.models.layers.linear import Linear, can_pack
from miniserve.models.options import BuildOptions
from miniserve.parallel.group import Alone
from miniserve.parallel.shard import Shard

MXFP4 = "mxfp4"
_FULL = 0.9  # of a GPU's memory that weights may take, where the number of GPUs is to be found
_MOST_RANKS = 64
_MXFP4_BYTES = 0.5 + 1 / 32  # of an expert's value: four bits, and a scale of eight for 32 of them


def build_model(config: ModelConfig, options: BuildOptions) -> CausalLM:
    """Make the model with its parameters on the meta device; `loader` gives them memory on `options.device`. Raises
    `UserError` where the model cannot reach `options.max_model_len`, or has not something for each rank."""
    if (options.max_model_len or 0) > config.max_position_embeddings:
        raise UserError(_too_long(config, options.max_model_len or 0))
    most = config.most_ranks(expert_parallel=options.expert_parallel)
    if options.group.size > most:
        raise UserError(f"{config.architecture} of this size can be shared by {most} ranks, not {options.group.size}.")
    return CausalLM(config, options).eval()


def check_ranks(config: ModelConfig, size: int, *, expert_parallel: bool) -> None:
    """Raises `UserError` where so many ranks cannot share the model, or have nothing to share out in this way."""
    if expert_parallel and size == 1:
        raise UserError("--enable-expert-parallel is for several ranks; give --tensor-parallel-size, too.")
    if expert_parallel and config.moe is None:
        raise UserError("--enable-expert-parallel is for models with experts, and this one has none; leave it out.")
    if size > (most := config.most_ranks(expert_parallel=expert_parallel)):
        raise UserError(f"--tensor-parallel-size {size} is more than this model can be shared by; at most {most} can.")


def least_ranks(
    config: ModelConfig, dtype: torch.dtype, platform: Platform | None, room: int, *, expert_parallel: bool
) -> int | None:
    """How many GPUs, of `room` bytes each, the weights need at least, with a tenth left for the KV cache. None where
    even the most are too few."""

    def weights(size: int) -> int:
        shard = Shard(0, size)
        return weight_bytes(described_model(config, dtype, platform, shard, expert_parallel=expert_parallel), "cuda")

    whole = weights(1)
    for size in range(1, min(_MOST_RANKS, config.most_ranks(expert_parallel=expert_parallel)) + 1):
        # To count takes seconds for a large model.
        if whole <= size * room and (whole if size == 1 else weights(size)) <= room * _FULL:
            return size
    return None


def described_model(
    config: ModelConfig,
    dtype: torch.dtype,
    platform: Platform | None = None,
    shard: Shard | None = None,
    *,
    expert_parallel: bool = False,
    fp8_activations: bool = True,
) -> CausalLM:
    """The layers of a shard as they would be built on `platform`, which need not be here, to read sizes and names."""
    is_cpu = platform is not None and platform.arch == "cpu"
    options = BuildOptions(
        dtype=dtype,
        kv_dtype=dtype,
        device=torch.device("meta"),
        max_model_len=1,
        group=Alone() if shard is None else Alone(shard.rank, shard.size),
        expert_parallel=expert_parallel,
        native=native.NativeKernels() if is_cpu and native.unavailable_reason() is None else None,
        platform=platform,
        fp8_activations=fp8_activations,
    )
    return CausalLM(config, options)


def weight_bytes(model: CausalLM, device: torch.device | str = "cpu") -> int:
    """Bytes that the model's weights occupy on `device` once they are loaded, a tied head's packed copy included (it
    exists on a CPU)."""
    count = sum(parameter.nbytes for parameter in model.parameters())
    config, dtype = model.config, model.options.dtype
    if config.quantization is not None and config.quantization.method == MXFP4:  # which `explain` knows, no layer
        experts = [layer for layer in model.modules() if isinstance(layer, Experts)]
        values = sum(parameter.numel() for layer in experts for parameter in layer.parameters(recurse=False))
        count -= int(values * (dtype.itemsize - _MXFP4_BYTES))
    if config.tie_word_embeddings and torch.device(device).type == "cpu" and can_pack(dtype):
        count += model.lm_head.out_features * config.hidden_size * dtype.itemsize
    return count


def describe_products(model: CausalLM) -> list[str]:
    """What multiplies the model's linear layers and routed experts, a sentence for all that have the same."""
    layers: dict[str, dict[str, None]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear | Experts) and layer.method.route is not None:
            sentence = layer.method.route.sentence(layer.method.name)
            layers.setdefault(sentence, {})[name.rpartition(".")[2]] = None
    found = [f"{', '.join(names)} by {sentence}" for sentence, names in layers.items()]
    failed = model.options.failed.get(TRITON_ROUTER)
    return found if failed is None else [*found, f"choice of experts by PyTorch; not by {TRITON_ROUTER}: {failed}"]


def _too_long(config: ModelConfig, length: int) -> str:
    limit = config.max_position_embeddings
    if config.rope.rope_type == "dynamic":
        return (
            f"--max-model-len {length} is above this model's {limit} tokens; its 'dynamic' rope scaling changes with "
            f"each sequence's length beyond that and is supported up to {limit}. Use --max-model-len {limit} or less."
        )
    return f"--max-model-len {length} is above this model's longest context; use --max-model-len {limit} or less."
