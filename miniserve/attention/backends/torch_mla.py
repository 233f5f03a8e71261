"""TORCH_MLA: latent attention in PyTorch alone, on any device, in float32 within. The reference, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from miniserve.attention.backends.gathered import RaggedLens
from miniserve.attention.backends.latent_base import LatentBackend, whole
from miniserve.attention.layouts import KVCache, decoded
from miniserve.attention.metadata import QueryRows
from miniserve.attention.spec import LatentLayer

# Bytes of latents, or of scores, that are made at a time.
_WORKSPACE = 64 << 20


class TorchLatentBackend(LatentBackend[QueryRows]):
    def build_decode(self, rows: QueryRows) -> QueryRows:
        return rows

    def decode(self, layer: LatentLayer, q: Tensor, q_pe: Tensor, cache: KVCache, meta: QueryRows) -> Tensor:
        """Some rows at a time over their gathered blocks, padded to the longest."""
        keys = meta.block_tables.shape[1] * self.layout.block_size
        step = max(1, _WORKSPACE // (4 * keys * max(layer.spec.head_dim, q.shape[1])))
        pieces = [slice(start, start + step) for start in range(0, q.shape[0], step)]
        return torch.cat([self._decode(layer, q[rows], q_pe[rows], cache, meta, rows) for rows in pieces])

    def _decode(
        self, layer: LatentLayer, q: Tensor, q_pe: Tensor, cache: KVCache, meta: QueryRows, rows: slice
    ) -> Tensor:
        blocks = meta.block_tables[rows].long()
        found = self.layout.gather(cache, blocks)
        kv_c, k_pe = decoded(found, torch.float32, layer.kv_scale, layer.kv_scale)
        kv_c, k_pe = kv_c.flatten(1, 2), k_pe.flatten(1, 2)  # [rows, width * block_size, …]
        scores = (torch.bmm(q.float(), kv_c.mT) + torch.bmm(q_pe.float(), k_pe.mT)) * layer.spec.scale
        # A padding row, of length 0, reads whatever its first slot has rather than nothing, which would be NaN.
        lens = meta.seq_lens[rows].clamp(min=1)
        hidden = torch.arange(scores.shape[-1], device=q.device) >= lens[:, None]
        weights = scores.masked_fill_(hidden[:, None], float("-inf")).softmax(-1)
        # What others left may be NaN, which a weight of 0 does not hide.
        return torch.bmm(weights, kv_c.masked_fill_(hidden[..., None], 0.0)).to(q.dtype)

    def attend_dense(
        self, layer: LatentLayer, q: Tensor, k: tuple[Tensor, Tensor], v: Tensor, lens: RaggedLens, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        keys_of = whole(k)
        out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
        starts, key_starts = lens.cu_query_lens.tolist(), lens.cu_key_lens.tolist()
        for row in range(len(starts) - 1):
            span, keys = slice(*starts[row : row + 2]), slice(*key_starts[row : row + 2])
            if span.start == span.stop:  # a padding row
                continue
            out[span], lse[:, span] = dense_attention(q[span], keys_of[keys], v[keys], layer.spec.scale, causal=causal)
        return out, lse


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One row's q [Lq, H, D] over its k [Lk, H, D] and v [Lk, H, Dv], some queries at a time. causal: Lq == Lk, and
    query i sees keys 0 … i. Returns out float32 [Lq, H, Dv] and lse float32 [H, Lq]."""
    queries, keys, values = (t.float().transpose(0, 1) for t in (q, k, v))  # [H, L, D]
    step = max(1, _WORKSPACE // (4 * k.shape[0] * k.shape[1]))
    outs, sums = [], []
    for start in range(0, q.shape[0], step):
        stop = min(start + step, q.shape[0])
        seen = stop if causal else k.shape[0]
        scores = torch.matmul(queries[:, start:stop], keys[:, :seen].mT).mul_(scale)
        if causal:
            at = torch.arange(seen, device=q.device)
            scores.masked_fill_(at > at[start:, None], float("-inf"))
        lse = scores.logsumexp(-1)
        outs.append(torch.matmul(scores.sub_(lse[..., None]).exp_(), values[:, :seen]))
        sums.append(lse)
    return torch.cat(outs, dim=1).transpose(0, 1), torch.cat(sums, dim=1)
