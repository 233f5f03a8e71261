"""What an attention backend does: write the step's keys and values, then attend over the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import StepBatch
from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionLayer, AttentionSpec, LatentLayer, LatentRope, QKRope
from miniserve.attention.terms import LayerRoute

Metadata = TypeVar("Metadata")
QKV = tuple[Tensor, Tensor, Tensor]  # of a step's tokens: see `StepContext.attend`
LatentTokens = tuple[Tensor, Tensor, Tensor, Tensor]  # q_nope, q_pe, kv_c, k_pe: see `StepContext.attend_latent`


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What a backend sizes its scratch memory by, once, and chooses its kernels by.

    specs, routes: of each layer. max_rows: most sequences in a step; max_seq_len: in tokens. trust_asm_lengths: lifts
    the guard of `routes.ASM_WRONG_LENGTHS`, for a GPU on which the ASM kernel was seen to get these lengths right.
    """

    specs: tuple[AttentionSpec, ...]
    routes: tuple[LayerRoute, ...]
    platform: Platform
    device: torch.device
    max_rows: int
    max_seq_len: int
    trust_asm_lengths: bool = False


class Backend(ABC, Generic[Metadata]):
    """Holds the layout and whatever scratch it needs, no step state. It implements `attend` or `attend_latent`; which,
    its contract says.

    `graphs`: its decode step can be captured in a device graph, or as a CPU's native calls, and replayed with other
    lengths and block tables.
    `chunks_in_graphs`: so can one with up to so many chunks; `contexts_in_graphs`: also of tokens that are cached.
    `fuses_rope`: it implements `attend_qkv`, or `attend_latent` with a rope.
    """

    graphs: bool = False
    chunks_in_graphs: int = 0
    contexts_in_graphs: bool = True
    fuses_rope: bool = False

    def __init__(self, layout: KVLayout, options: BackendOptions | None = None) -> None:
        """With its scratch memory. Kernels are imported here: Triton may not be installed. options: those in PyTorch
        and C++ do without."""
        self.layout = layout

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        """Bytes that it takes beside the cache, where they are more than a few megabytes. layout: its name."""
        return 0

    @classmethod
    def extra_block_bytes(cls, layout: KVLayout, spec: AttentionSpec, route: LayerRoute) -> int:
        """Bytes that it keeps beside each block of a layer."""
        return 0

    @abstractmethod
    def build(self, batch: StepBatch) -> Metadata:
        """The step's metadata, for all layers that are called before the next `build`."""

    def attend(self, layer: AttentionLayer, tokens: QKV, cache: KVCache, meta: Metadata) -> Tensor:
        """The whole step for one layer: see `StepContext.attend`."""
        raise NotImplementedError(f"{type(self).__name__} has no multi-head attention")

    def attend_qkv(self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: Metadata) -> Tensor:
        """See `StepContext.attend_qkv`."""
        raise NotImplementedError(f"{type(self).__name__} does not rotate")

    def attend_latent(
        self, layer: LatentLayer, tokens: LatentTokens, cache: KVCache, meta: Metadata, rope: LatentRope | None = None
    ) -> Tensor:
        """The whole step for one MLA layer: see `StepContext.attend_latent`. The latent is `cache.key`."""
        raise NotImplementedError(f"{type(self).__name__} has no latent attention")
