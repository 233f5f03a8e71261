"""What backends are made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import LayerRoute


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
