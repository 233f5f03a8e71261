"""TRITON_ATTN: the engine's own Triton kernels for everything, on NVIDIA's and AMD's GPUs.

On NVIDIA's, chunks of a shuffled cache read a copy of their blocks in the linear layout. No chunk reads its own keys
and values dense, as they were before an fp8 cache rounded them: what a query sees must not depend on how its prompt was
cut.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from miniserve.attention.backends.base import QKV, BackendOptions
from miniserve.attention.backends.paged import PagedBackend, PagedMetadata, cache_terms
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.spec import AttentionLayer, AttentionSpec
from miniserve.kernels.triton.launch import Launch, cdiv, choose_splits, decode_launch, extend_launch, extend_splits

LINEARIZE_FROM = 16  # query tokens of a chunk; shorter ones are read in place about as fast (measured on an H100)
CHUNKS_IN_GRAPHS = 8
LINEARIZED_TOKENS = 32768  # cached tokens that are copied at most, for all of a step's chunks; more are read in place


class SplitPlan:
    """How many programs share a row's keys, by the step's rows and longest row, and the scratch that takes at most."""

    def __init__(self, spec: AttentionSpec, options: BackendOptions) -> None:
        from miniserve.kernels.triton.split_kv import DecodeScratch

        self._num_sms, self._kv_heads = options.platform.compute_units, spec.num_kv_heads
        group = spec.num_heads // spec.num_kv_heads
        self._choose = partial(decode_launch, options.platform.vendor, spec.head_dim, spec.kv_dtype.itemsize, group)
        self._launch = self._choose()
        self._head_tiles = spec.num_kv_heads * cdiv(group, self._launch.block_m)
        launches = [(rows, self.splits(rows, options.max_seq_len)) for rows in range(1, options.max_rows + 1)]
        self.scratch = DecodeScratch.allocate(launches, spec.num_heads, spec.head_dim, options.device)

    def launch(self, rows: int) -> Launch:
        return self._choose(rows * self._kv_heads / self._num_sms)

    def splits(self, rows: int, max_seq_len: int) -> int:
        return choose_splits(rows, self._head_tiles, max_seq_len, self._launch, self._num_sms)


class TritonBackend(PagedBackend[PagedMetadata]):
    linearize_from = LINEARIZE_FROM

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        from miniserve.kernels.triton.linearize import linearize
        from miniserve.kernels.triton.paged_decode import paged_decode
        from miniserve.kernels.triton.paged_extend import paged_extend
        from miniserve.kernels.triton.runtime import gluon_kernels

        super().__init__(layout, options)
        self._paged_decode, self._paged_extend, self._linearize = paged_decode, paged_extend, linearize
        self._hopper = gluon_kernels("hopper_extend", options.device, "prefill attention runs slower")
        # Copies and splits of chunks were measured on NVIDIA's GPUs alone.
        on_nvidia = options.platform.vendor == "cuda"
        self._split_over = options.platform.compute_units if on_nvidia else 1
        self._copies = layout.name == "shuffled" and on_nvidia
        # A graph copies block tables of any length, so it must have room for the longest.
        most = LINEARIZED_TOKENS // options.max_seq_len if self._copies else CHUNKS_IN_GRAPHS
        self.chunks_in_graphs = min(most, CHUNKS_IN_GRAPHS)
        if self._copies:  # block tables of the copies
            blocks = LINEARIZED_TOKENS // layout.block_size + CHUNKS_IN_GRAPHS  # see `table_width`
            self._linear_tables = torch.arange(blocks, dtype=torch.int32, device=options.device)
        self._plans = {_shape(spec): SplitPlan(spec, options) for spec in options.specs}

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        """A layer's copy in the linear layout."""
        if layout != "shuffled":
            return 0
        token = max(2 * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize for spec in options.specs)
        return min(LINEARIZED_TOKENS, options.max_rows * options.max_seq_len) * token

    def build(self, batch: StepBatch) -> PagedMetadata:
        return PagedMetadata(batch)

    def decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, meta: PagedMetadata, out: Tensor
    ) -> None:
        plan = self._plans[_shape(layer.spec)]
        self._paged_decode(
            q,
            cache.key,
            cache.value,
            rows.block_tables,
            rows.seq_lens,
            num_splits=plan.splits(q.shape[0], rows.max_seq_len),
            launch=plan.launch(q.shape[0]),
            fresh=rows.fresh,
            scratch=plan.scratch,
            out=out,
            **self._terms(layer),
        )

    def chunk(
        self, layer: AttentionLayer, tokens: QKV, cache: KVCache, rows: QueryRows, meta: PagedMetadata, out: Tensor
    ) -> None:
        q = tokens[0][rows.start : rows.end]
        planes, terms = (cache.key, cache.value), self._terms(layer)
        tables, lens = rows.block_tables, (rows.cu_query_lens, rows.seq_lens)
        num_splits = self._extend_splits(layer.spec, rows)
        if self._copies and rows.max_query_len >= self.linearize_from and tables.numel() <= len(self._linear_tables):
            planes = self._linearize(*planes, tables, *lens, window=layer.spec.sliding_window)
            tables, terms["shuffled"] = self._linear_tables[: tables.numel()].view(tables.shape), False
        longest = rows.max_query_len
        plain = num_splits == 1 and not terms["shuffled"] and layer.spec.softcap is None
        if plain and self._hopper is not None and self._hopper.can_extend(q, planes[0], longest):
            chosen = {name: terms[name] for name in ("scale", "window", "sinks")}
            self._hopper.hopper_extend(q, *planes, tables, *lens, max_query_len=longest, out=out, **chosen)
        else:
            self._paged_extend(
                q, *planes, tables, *lens, max_query_len=longest, num_splits=num_splits, out=out, **terms
            )

    def _extend_splits(self, spec: AttentionSpec, rows: QueryRows) -> int:
        queries = rows.max_query_len * spec.num_heads // spec.num_kv_heads
        launch = extend_launch("cuda", spec.head_dim, spec.kv_dtype.itemsize, queries)
        chunks = len(rows.query_lens) - rows.query_lens.count(0)
        programs = spec.num_kv_heads * cdiv(queries, launch.block_m) * chunks
        return extend_splits(programs, rows.max_seq_len, self._split_over)

    def _terms(self, layer: AttentionLayer) -> dict[str, Any]:
        spec = layer.spec
        return cache_terms(self.layout, layer) | {
            "num_kv_heads": spec.num_kv_heads,
            "scale": spec.scale,
            "window": spec.sliding_window,
            "softcap": spec.softcap,
            "sinks": layer.sinks,
        }


def _shape(spec: AttentionSpec) -> tuple[int, int, int]:
    return spec.num_heads, spec.num_kv_heads, spec.head_dim
