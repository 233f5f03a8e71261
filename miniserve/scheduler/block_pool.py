"""The KV cache's blocks: who holds them, which are free, and which hold a prefix worth finding again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = 0  # the chain id before a sequence's first block

Chain = int | str  # a block's; or, before the first block, ROOT or the salt of those who share what follows
Key = tuple[Chain, tuple[int, ...]]  # (chain id of the parent block, the block's tokens)


class BlockPool:
    """Reference-counted blocks with a prefix cache over full ones; every operation is O(1) per block.

    A cached block is found by its tokens and the chain id of its parent, hence by all tokens before it. The idea of
    hashing (parent, tokens) is PagedAttention's (Kwon et al. 2023) as vLLM's automatic prefix caching has it; here the
    dict compares the key itself, so that equal hashes of different tokens cannot be confused. A chain id is never used
    twice: when a block is reallocated its key is dropped, and the blocks chained to it can no longer be found.

    A free block keeps its content until it is reallocated, least recently released first; blocks that are not in the
    cache are taken before all others.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # in order of reallocation
        self._cached: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_blocks
        self._chains = [ROOT] * num_blocks
        self._last_chain = ROOT

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_cached(self, block: int) -> bool:
        """Whether a prefix may be found in it."""
        return self._keys[block] is not None

    def num_holders(self, block: int) -> int:
        return self._refs[block]

    def match(self, token_ids: Sequence[int], block_size: int, max_tokens: int, chain: Chain = ROOT) -> list[int]:
        """The cached blocks of the longest known prefix of `token_ids`, at most `max_tokens` tokens long, behind
        `chain`."""
        blocks: list[int] = []
        for end in range(block_size, max_tokens + 1, block_size):
            block = self._cached.get((chain, tuple(token_ids[end - block_size : end])))
            if block is None:
                break
            blocks.append(block)
            chain = self._chains[block]
        return blocks

    def chain_of(self, block: int) -> int:
        """The chain id after this matched block, with which a sequence continues."""
        return self._chains[block]

    def count_free(self, blocks: Iterable[int]) -> int:
        return sum(not self._refs[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to matched blocks."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, at most `num_free`, and drop their content from the cache."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
            key = self._keys[block]
            if key is not None:
                del self._cached[key]
                self._keys[block] = None
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Release a sequence's blocks, passed in the order of its block table. Its tail is reallocated first: a prefix
        without its tail is still useful, a tail without its prefix is not."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, parent: Chain, token_ids: tuple[int, ...]) -> int:
        """Cache a held, full block as the continuation of chain `parent`; returns its chain id.

        If another block is cached for the same tokens, that one stays, unless it is free: the held block lives longer.
        """
        key = (parent, token_ids)
        other = self._cached.get(key)
        if other is None:
            self._last_chain += 1
            chain = self._last_chain
        else:
            chain = self._chains[other]
            if self._refs[other]:
                return chain
            self._keys[other] = None
            self._free.move_to_end(other, last=False)
        self._cached[key] = block
        self._keys[block] = key
        self._chains[block] = chain
        return chain
