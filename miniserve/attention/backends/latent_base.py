"""What the backends of latent attention share: the order of a step, absorbed for decode rows and expanded for chunks.

A decode row meets the latents themselves: the query is taken to their space (`LatentLayer.absorb`) and the result back
(`project_out`), so a cached token is read once for all heads. A chunk has enough query tokens to make it cheaper to
expand keys and values: those of the new tokens at once, those of the cached context a bounded piece at a time, each
merged by log-sum-exp (DeepSeek-V2, section 2.1.2; vLLM's MLA backends do it in the same two ways).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from miniserve.attention.backends.base import Backend, LatentTokens
from miniserve.attention.backends.gathered import GatheredRows, RaggedLens, add_context, context_pieces, merge_into
from miniserve.attention.layouts import KVCache, decoded
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.spec import LatentLayer, LatentRope

Decode = TypeVar("Decode")

# Of context, expanded at a time: 42 MB in bfloat16 with 16 heads of 192 + 128, 336 MB with 128.
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class LatentMetadata(Generic[Decode]):
    """decode: what `LatentBackend.decode` reads. chunks: the step's tokens of all chunks, with context or without, and
    how they divide; context: what is cached of them, a piece at a time."""

    batch: StepBatch
    decode: Decode | None
    chunks: tuple[slice, RaggedLens] | None
    context: tuple[GatheredRows, ...]


class LatentBackend(Backend[LatentMetadata[Decode]]):
    """Subclasses say how decode rows are described and computed, and how dense keys and values are attended to."""

    context_tokens = CONTEXT_TOKENS

    @abstractmethod
    def build_decode(self, rows: QueryRows) -> Decode:
        """What `decode` reads."""

    @abstractmethod
    def decode(self, layer: LatentLayer, q: Tensor, q_pe: Tensor, cache: KVCache, meta: Decode) -> Tensor:
        """q [rows, num_heads, kv_lora_rank], absorbed, and q_pe [rows, num_heads, rope_dim], last dimensions dense,
        over each row's latents, its own token's included. Returns [rows, num_heads, kv_lora_rank], q's dtype."""

    @abstractmethod
    def attend_dense(
        self, layer: LatentLayer, q: Tensor, k: tuple[Tensor, Tensor], v: Tensor, lens: RaggedLens, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q [tokens, num_heads, nope_dim + rope_dim] of the rows of `lens`, k without rope [keys, num_heads, nope_dim]
        and what all heads share [keys, rope_dim] (see `whole`), v [keys, num_heads,
        v_head_dim], row after row; causal: query i of a row sees its keys up to i, and there are as many of both.
        Returns out [tokens, num_heads, v_head_dim] and lse float32 [num_heads, tokens], as `merge_lse` has it."""

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """As `merge_into`: what `attend_dense` gives for other keys, into what it gave (out: or in float32)."""
        merge_into(out, lse, part, part_lse)

    def write(self, layer: LatentLayer, cache: KVCache, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
        self.layout.write(cache, kv_c, k_pe, slot_mapping, layer.kv_scale, layer.kv_scale)

    def rope_and_write(
        self, layer: LatentLayer, cache: KVCache, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, rope: LatentRope,
        batch: StepBatch,
    ) -> None:  # fmt: skip
        """Norm and rotate the three in place, and write the latter two."""
        raise NotImplementedError(f"{type(self).__name__} does not rotate")

    def build(self, batch: StepBatch) -> LatentMetadata[Decode]:
        extend = batch.extend
        return LatentMetadata(
            batch,
            None if batch.decode is None else self.build_decode(batch.decode),
            _together(batch.chunks) if batch.chunks else None,
            () if extend is None else context_pieces(extend, self.layout.block_size, self.context_tokens),
        )

    def attend_latent(
        self,
        layer: LatentLayer,
        tokens: LatentTokens,
        cache: KVCache,
        meta: LatentMetadata[Decode],
        rope: LatentRope | None = None,
    ) -> Tensor:
        q_nope, q_pe, kv_c, k_pe = tokens
        if rope is None:
            self.write(layer, cache, kv_c, k_pe, meta.batch.slot_mapping)
        else:
            self.rope_and_write(layer, cache, q_pe, kv_c, k_pe, rope, meta.batch)
        parts: list[Tensor] = []
        if meta.batch.decode is not None and meta.decode is not None:
            rows = slice(0, meta.batch.decode.end)
            found = self.decode(layer, layer.absorb(q_nope[rows]), q_pe[rows], cache, meta.decode)
            parts.append(layer.project_out(found))
        if meta.chunks is not None:
            span, lens = meta.chunks
            q = _joined(q_nope[span], q_pe[span])
            out, lse = self.attend_dense(layer, q, *_expand(layer, kv_c[span], k_pe[span]), lens, causal=True)
            if meta.context:

                def attend(piece: GatheredRows) -> tuple[Tensor, Tensor]:
                    found = self.layout.gather_tokens(cache, piece.slots)
                    cached = decoded(found, layer.spec.dtype, layer.kv_scale, layer.kv_scale)
                    queries = q[piece.start - span.start : piece.end - span.start]
                    return self.attend_dense(layer, queries, *_expand(layer, *cached), piece.lens, causal=False)

                add_context(out, lse, span.start, meta.context, attend, self.merge)
            parts.append(out.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _together(groups: tuple[QueryRows, ...]) -> tuple[slice, RaggedLens]:
    """Extends and prefills alike: among themselves new tokens are attended to in one go."""
    starts, longest = groups[0].cu_query_lens, max(group.max_query_len for group in groups)
    if len(groups) == 2:
        starts = torch.cat([starts, groups[1].cu_query_lens[1:] + (groups[0].end - groups[0].start)])
    return slice(groups[0].start, groups[-1].end), RaggedLens(starts, starts, longest, longest)


def _expand(layer: LatentLayer, kv_c: Tensor, k_pe: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Keys, as `attend_dense` takes them, and values [N, num_heads, v_head_dim] of latents."""
    k_nope, v = layer.expand(kv_c)
    return (k_nope, k_pe), v


def whole(k: tuple[Tensor, Tensor]) -> Tensor:
    """Each head's keys with what all heads share: [N, num_heads, nope_dim + rope_dim]."""
    k_nope, k_pe = k
    return torch.cat([k_nope, k_pe[:, None].expand(-1, k_nope.shape[1], -1)], dim=-1)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Side by side along the last dimension; without a copy where they lie so, as parts of one projection do."""
    width = first.shape[-1]
    of_one = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if of_one and first.stride() == second.stride() and first.storage_offset() + width == second.storage_offset():
        return first.as_strided((*first.shape[:-1], width + second.shape[-1]), first.stride())
    return torch.cat([first, second], dim=-1)
