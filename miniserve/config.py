"""Configuration: frozen, resolved once, validated with sentences. The only reader of environment variables."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from miniserve.core import InvalidRequest, UserError, check_types

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_CHOICES = {
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "device": ("auto", "cpu", "cuda"),
    "load_format": ("auto", "dummy"),
    "kv_layout": ("auto", "linear", "shuffled", "latent"),
    "kv_cache_dtype": ("auto", "bfloat16", "float16", "float32", "fp8"),
    "generation_config": ("auto", "none"),
    "log_level": LOG_LEVELS,
    "log_format": ("text", "json"),
}
_POSITIVE = (
    "max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len", "kv_cache_memory", "tensor_parallel_size",
    "data_parallel_size", "nnodes",
)  # fmt: skip
_MOST_SEQS = 65_536  # each takes host memory, which no plan accounts for
_MOST_RANKS = 1024
_MASTER_PORT = 29_500  # torch's default


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked of the engine. `auto` and None are settled when the engine starts (see `core.EngineInfo`).

    model: local directory, hub id or None for the built-in model. Sizes are tokens unless the name says otherwise;
    kv_cache_memory is in bytes, of each rank. gpu_memory_utilization None: 0.9; a CPU has none. max_num_batched_tokens
    None: 4096 on a GPU, 2048 on a CPU. max_itl_ratio: by how much prefill may slow down a step that also decodes, 0: no
    bound. speculative: "ngram:K", or None for no speculation. aiter: whether to use it where it is installed.
    fp8_activations: round what is multiplied with weights in 8 bits to them in large steps, where the checkpoint asks
    for that. tensor_parallel_size: ranks that share the model, None: 1, or the GPUs that it takes; they are spread
    evenly over `nnodes` hosts, of which this is number `node_rank`, and number 0 is at `master_addr`.
    enable_expert_parallel: ranks have whole experts. data_parallel_size: engines that share out the requests, each with
    so many ranks; data_parallel_rank: which of them this is, set where they are started. Raises `UserError` for a value
    out of range.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_itl_ratio: float = 0.0
    block_size: int = 16
    kv_layout: str = "auto"
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    speculative: str | None = None
    tensor_parallel_size: int | None = None
    enable_expert_parallel: bool = False
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    enforce_eager: bool = False
    aiter: bool = True
    fp8_activations: bool = True
    self_check: bool = True
    generation_config: Literal["auto", "none"] = "auto"
    seed: int = 0
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{_flag(name)} {value!r} is not known; choose one of {', '.join(choices)}.")
        try:
            check_types(self)
        except InvalidRequest as wrong:
            raise UserError(str(wrong)) from None
        for name in _POSITIVE:
            if (number := getattr(self, name)) is not None and not 0 < number < 2**63:
                raise UserError(f"{_flag(name)} must be a positive number of 64 bits, not {number}.")
        if self.max_num_seqs > _MOST_SEQS:
            raise UserError(f"--max-num-seqs must be at most {_MOST_SEQS}, not {self.max_num_seqs}.")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed must be a 64-bit integer, not {self.seed}.")
        if self.max_itl_ratio != 0.0 and not 1.0 < self.max_itl_ratio < math.inf:
            raise UserError("--max-itl-ratio must be above 1, for example 2, or 0 for no bound.")
        if self.gpu_memory_utilization is not None and not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise UserError("--gpu-memory-utilization must be above 0 and at most 1, for example 0.9.")
        if self.speculative is not None:
            self._check_speculative(self.speculative)
        self._check_ranks()

    def _check_ranks(self) -> None:
        ranks, nodes = self.tensor_parallel_size, self.nnodes
        if (ranks or 1) > _MOST_RANKS:
            raise UserError(f"--tensor-parallel-size must be at most {_MOST_RANKS}, not {ranks}.")
        if self.data_parallel_size > _MOST_RANKS:
            raise UserError(f"--data-parallel-size must be at most {_MOST_RANKS}, not {self.data_parallel_size}.")
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise UserError("data_parallel_rank is set by the server for each of --data-parallel-size; leave it out.")
        if nodes == 1:
            for name in ("node_rank", "master_addr", "master_port"):
                if getattr(self, name):
                    raise UserError(
                        f"{_flag(name)} is for a model on several hosts; give --nnodes, too, or leave it out."
                    )
            return
        if self.data_parallel_size > 1:
            raise UserError(
                "--data-parallel-size is for the GPUs of one host; with --nnodes start a server for each copy of the "
                "model, behind a load balancer."
            )
        if ranks is None or ranks % nodes:
            raise UserError(
                f"--nnodes {nodes} needs a --tensor-parallel-size that is a multiple of it, as on all hosts."
            )
        if not 0 <= self.node_rank < nodes:
            raise UserError(f"--node-rank must be between 0 and {nodes - 1}, as there are {nodes} hosts.")
        if not self.master_addr:
            raise UserError("--nnodes needs --master-addr, an address of host 0 that all hosts reach.")
        if not 0 < (self.master_port or _MASTER_PORT) < 65_536:
            raise UserError(f"--master-port must be between 1 and 65535, not {self.master_port}.")

    @property
    def ranks_here(self) -> int:
        """Ranks of an engine on this host."""
        return (self.tensor_parallel_size or 1) // self.nnodes

    @property
    def processes_here(self) -> int:
        """Ranks of all engines on this host, which share a CPU."""
        return self.ranks_here * self.data_parallel_size

    @property
    def master(self) -> tuple[str, int]:
        """Where ranks of several hosts meet: address and port."""
        return self.master_addr or "127.0.0.1", self.master_port or _MASTER_PORT

    def differs(self, other: EngineConfig) -> str | None:
        """The flag of a setting that is another one in `other`, of those that all hosts of a model must share."""
        own = ("model", "revision", "node_rank", "log_level")  # a directory may be called differently there
        names = (each.name for each in fields(self) if each.name not in own)
        return next((_flag(name) for name in names if getattr(self, name) != getattr(other, name)), None)

    def _check_speculative(self, speculative: str) -> None:
        if re.fullmatch(r"ngram:([1-9]|1[0-6])", speculative) is None:
            raise UserError(
                f"--speculative {speculative!r} is not known; give it as ngram:K with K, the most tokens to guess at "
                "once, between 1 and 16, for example ngram:4."
            )
        if self.async_scheduling:
            raise UserError("--speculative needs each step's tokens for the next; leave --async-scheduling out.")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            most = getattr(self, name)
            if most is not None and most <= self.num_draft_tokens:
                raise UserError(
                    f"--speculative {speculative} computes up to {self.num_draft_tokens + 1} tokens of a request in a "
                    f"step, each in a row of its own; raise {_flag(name)} from {most}."
                )

    @property
    def num_draft_tokens(self) -> int:
        """K of --speculative; 0 without."""
        return 0 if self.speculative is None else int(self.speculative.removeprefix("ngram:"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler needs to know, all settled. Sizes in tokens, num_blocks in blocks."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    eos_token_ids: frozenset[int] = frozenset()
    num_draft_tokens: int = 0  # most guesses behind a sequence's last token, 0: no speculation


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def cache_dir() -> Path:
    """Where what was compiled or measured is kept: `$XDG_CACHE_HOME/miniserve`, by default ~/.cache/miniserve."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "miniserve"


def api_key_from_environment() -> str | None:
    """`$MINISERVE_API_KEY`, which the process list of the machine does not show; None where it is not set."""
    return os.environ.get("MINISERVE_API_KEY")


def tuning_dir() -> Path:
    """Where `miniserve tune` keeps its tables."""
    return cache_dir() / "tuning"
