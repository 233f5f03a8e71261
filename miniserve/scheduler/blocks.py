"""The blocks that sequences hold: given to them, offered to the prefix cache once full, and given up."""

from __future__ import annotations

from miniserve.config import SchedulerConfig
from miniserve.scheduler.block_pool import BlockPool
from miniserve.scheduler.sequence import Sequence


class SequenceBlocks:
    """Between sequences and the pool; keeps what came to block tables for the next plan (see `StepPlan.new_blocks`)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_blocks)
        self._size = config.block_size
        self._caching = config.enable_prefix_caching
        self._new: list[tuple[int, int, list[int]]] = []

    def take_new(self) -> list[tuple[int, int, list[int]]]:
        """What came since the last call, as (row, index in its table, blocks)."""
        new, self._new = self._new, []
        return new

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        """How many more blocks the sequence's first `num_tokens` tokens need."""
        return -(-num_tokens // self._size) - len(seq.blocks)

    def uses_cache(self, seq: Sequence) -> bool:
        """Where prompt logprobs are wanted all of the prompt is computed, as they come from its logits."""
        return self._caching and seq.prompt_logprobs is None

    def find_prefix(self, seq: Sequence) -> list[int]:
        """The blocks that need no computing. At least one token must be computed, to sample the next from."""
        if not self.uses_cache(seq):
            return []
        return self.pool.match(seq.token_ids, self._size, len(seq.token_ids) - 1)

    def start(self, seq: Sequence, hits: list[int]) -> None:
        """Give a sequence that has its row the cached blocks that it begins with, and new ones for all it prefills."""
        seq.num_registered = len(hits)
        seq.chain = self.pool.chain_of(hits)
        seq.num_computed = len(hits) * self._size
        self.pool.share(hits)
        self._give(seq, hits + self.pool.allocate(self.missing(seq, seq.prefill_len) - len(hits)))

    def grow(self, seq: Sequence, count: int) -> None:
        """Give a decoding sequence `count` more blocks, of those that are free."""
        self.cache_full(seq)
        self._give(seq, self.pool.allocate(count))

    def _give(self, seq: Sequence, blocks: list[int]) -> None:
        self._new.append((seq.row, len(seq.blocks), blocks))
        seq.blocks += blocks
        seq.limit = min(len(seq.blocks) * self._size, seq.end)

    def cache_full(self, seq: Sequence) -> None:
        """Let other sequences find the blocks whose tokens are known and whose KV launched steps compute."""
        if not self._caching:
            return
        size = self._size
        full = min(len(seq.token_ids), seq.num_computed) // size
        for index in range(seq.num_registered, full):
            token_ids = tuple(seq.token_ids[index * size : (index + 1) * size])
            seq.chain = self.pool.register(seq.blocks[index], seq.chain, token_ids)
        seq.num_registered = full

    def release(self, seq: Sequence) -> None:
        """Give up all of them."""
        self.cache_full(seq)
        self.pool.release(seq.blocks)
        seq.blocks = []
