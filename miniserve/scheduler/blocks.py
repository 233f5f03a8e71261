"""The blocks that sequences hold: allocate them, cache them once full, release them."""

from __future__ import annotations

from miniserve.config import SchedulerConfig
from miniserve.core import PoolView
from miniserve.scheduler.block_pool import BlockPool
from miniserve.scheduler.sequence import Sequence


class SequenceBlocks:
    """Manages sequences' blocks in the pool; collects additions to block tables for the next plan
    (`StepPlan.new_blocks`)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_blocks)
        self._size = config.block_size
        self._caching = config.enable_prefix_caching
        self._new: list[tuple[int, int, list[int]]] = []
        self._row_sums = [0] * config.num_blocks  # of each block's holders: with one holder, its row

    def take_new(self) -> list[tuple[int, int, list[int]]]:
        """Additions since the last call, as (row, index in its table, blocks)."""
        new, self._new = self._new, []
        return new

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        """How many more blocks the sequence's first `num_tokens` tokens need."""
        return -(-num_tokens // self._size) - len(seq.blocks)

    def uses_cache(self, seq: Sequence) -> bool:
        """False for a request with prompt logprobs: these come from the prompt's logits, so all of it is computed."""
        return self._caching and seq.prompt_logprobs is None

    def find_prefix(self, seq: Sequence) -> list[int]:
        """The cached blocks of the sequence's prefix. At least one token remains to compute, to sample the next
        from."""
        if not self.uses_cache(seq):
            return []
        return self.pool.match(seq.token_ids, self._size, len(seq.token_ids) - 1, seq.root)

    def start(self, seq: Sequence, hits: list[int]) -> None:
        """Start a sequence, which has its row, with its cached prefix `hits` and new blocks for all that it
        prefills."""
        seq.num_registered = len(hits)
        seq.chain = self.pool.chain_of(hits[-1]) if hits else seq.root
        seq.num_computed = len(hits) * self._size
        self.pool.share(hits)
        self._append(seq, hits + self.pool.allocate(self.missing(seq, seq.prefill_len) - len(hits)))

    def grow(self, seq: Sequence, count: int) -> None:
        """Add `count` free blocks to a decoding sequence."""
        self.cache_full(seq)
        self._append(seq, self.pool.allocate(count))

    def _append(self, seq: Sequence, blocks: list[int]) -> None:
        self._new.append((seq.row, len(seq.blocks), blocks))
        seq.blocks += blocks
        for block in blocks:
            self._row_sums[block] += seq.row
        seq.limit = min(len(seq.blocks) * self._size, seq.end)

    def cache_full(self, seq: Sequence) -> None:
        """Put the sequence's blocks into the prefix cache whose tokens are known and whose KV is computed by launched
        steps."""
        if not self._caching:
            return
        size = self._size
        full = min(len(seq.token_ids), seq.num_computed) // size
        for index in range(seq.num_registered, full):
            token_ids = tuple(seq.token_ids[index * size : (index + 1) * size])
            seq.chain = self.pool.register(seq.blocks[index], seq.chain, token_ids)
        seq.num_registered = full

    def release(self, seq: Sequence) -> None:
        """Release all blocks of the sequence."""
        self.cache_full(seq)
        self.pool.release(seq.blocks)
        for block in seq.blocks:
            self._row_sums[block] -= seq.row
        seq.blocks = []

    def owner(self, block: int) -> int:
        """As in `PoolView.owners`."""
        holders = self.pool.num_holders(block)
        if holders:
            return self._row_sums[block] if holders == 1 else PoolView.SHARED
        return PoolView.KEPT if self.pool.is_cached(block) else PoolView.FREE
