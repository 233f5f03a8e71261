from __future__ import annotations

import random

import pytest
from scheduler_integrity import pool_faults

from miniserve.scheduler.block_pool import ROOT, BlockPool, sample

SIZE = 2
HASH_MODULUS = 2**61 - 1  # of CPython's int hash: n and n + HASH_MODULUS collide


def register(pool: BlockPool, blocks: list[int], tokens: list[int]) -> list[int]:
    chains = [ROOT]
    for i, block in enumerate(blocks):
        chains.append(pool.register(block, chains[-1], tuple(tokens[i * SIZE : (i + 1) * SIZE])))
    return chains[1:]


def match(pool: BlockPool, tokens: list[int], max_tokens: int | None = None) -> list[int]:
    return pool.match(tokens, SIZE, len(tokens) if max_tokens is None else max_tokens)


@pytest.mark.parametrize(("num_blocks", "stride"), [(1, 1), (7, 1), (3276, 2), (1000, 8), (1001, 489)])
def test_a_sample_has_a_block_of_each_part_and_follows_no_rhythm(num_blocks: int, stride: int) -> None:
    blocks = sample(num_blocks, stride)
    assert [block // stride for block in blocks] == list(range(-(-num_blocks // stride)))
    assert blocks[-1] < num_blocks
    if len(blocks) > 100:
        assert {block % stride for block in blocks} == set(range(stride))


def test_a_prefix_is_found_block_by_block_up_to_the_limit() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(3)
    register(pool, blocks, [1, 2, 3, 4, 5, 6])
    assert match(pool, [1, 2, 3, 4, 5, 6, 7]) == blocks
    assert match(pool, [1, 2, 3, 4, 5]) == blocks[:2]
    assert match(pool, [1, 2, 3, 4, 5, 6], max_tokens=5) == blocks[:2]
    assert match(pool, [1, 2, 9, 4, 5, 6]) == blocks[:1]
    assert match(pool, [3, 4]) == []


def test_equal_hashes_of_different_tokens_are_told_apart() -> None:
    pool = BlockPool(4)
    twin = [1 + HASH_MODULUS, 2]
    assert hash((ROOT, (1, 2))) == hash((ROOT, tuple(twin)))
    blocks = pool.allocate(2)
    register(pool, blocks[:1], [1, 2])
    assert match(pool, twin) == []
    register(pool, blocks[1:], twin)
    assert match(pool, twin) == blocks[1:]
    assert match(pool, [1, 2]) == blocks[:1]


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    register(pool, first, [1, 1, 5, 5])
    register(pool, second, [2, 2, 5, 5])
    assert match(pool, [1, 1, 5, 5]) == first
    assert match(pool, [2, 2, 5, 5]) == second


def test_a_reallocated_block_is_forgotten_and_so_is_what_followed_it() -> None:
    pool = BlockPool(3)
    head, tail = pool.allocate(1), pool.allocate(1)
    register(pool, head + tail, [1, 2, 3, 4])
    pool.release(head)  # not the order of a sequence: the tail's holder stays
    pool.release(pool.allocate(2))
    assert match(pool, [1, 2, 3, 4]) == []
    again = pool.allocate(1)
    register(pool, again, [1, 2])
    assert match(pool, [1, 2, 3, 4]) == again  # the tail's key names a chain that is gone for good
    assert pool_faults(pool, [tail, again]) == []


def test_free_blocks_are_reallocated_useless_ones_first_then_oldest_and_tails_first() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    register(pool, first, [1, 2, 3, 4, 5, 6])
    register(pool, second[:2], [6, 7, 8, 9])
    pool.release(first)
    pool.release(second)
    assert pool.allocate(6) == [second[2], first[2], first[1], first[0], second[1], second[0]]


def test_a_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    register(pool, blocks, [1, 2, 3, 4])
    assert pool.count_free(blocks) == 0
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert (pool.num_free, pool.count_free(blocks)) == (3, 2)
    pool.share(match(pool, [1, 2, 3, 4]))
    assert pool.num_free == 1
    assert pool_faults(pool, [blocks]) == []


def test_of_two_equal_blocks_the_held_one_is_kept() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    [chain] = register(pool, first, [1, 2])
    assert register(pool, second, [1, 2]) == [chain]
    assert match(pool, [1, 2]) == first
    pool.release(first)
    assert register(pool, second, [1, 2]) == [chain]
    assert match(pool, [1, 2]) == second
    assert pool.allocate(1) == first  # nobody can find it any more
    assert pool_faults(pool, [first, second]) == []


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_a_match_holds_exactly_these_tokens(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12)
    content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end, as written by its last owner
    held: list[list[int]] = []
    for _ in range(600):
        if held and (rng.random() < 0.45 or pool.num_free < 5):
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            tokens = [rng.randrange(2) for _ in range(2 * rng.randint(1, 5))]
            hits = match(pool, tokens)
            for i, block in enumerate(hits):
                assert content[block] == tuple(tokens[: (i + 1) * SIZE])
            pool.share(hits)
            blocks = hits + pool.allocate(len(tokens) // SIZE - len(hits))
            for i, block in enumerate(blocks):
                content[block] = tuple(tokens[: (i + 1) * SIZE])
            register(pool, blocks[: rng.randint(0, len(blocks))], tokens)
            held.append(blocks)
        assert pool_faults(pool, held) == []


def test_faults_are_found() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    register(pool, blocks, [1, 2, 3, 4])
    assert pool_faults(pool, [blocks]) == []
    assert "counts 1 holders, has 0" in pool_faults(pool, [blocks[:1]])[0]
    assert "counts 1 holders, has 2" in pool_faults(pool, [blocks, blocks[:1]])[0]
    del pool._free[2]
    assert pool_faults(pool, [blocks]) == ["leaked or doubly owned blocks: [2]"]
    pool._free[2] = None
    pool._keys[blocks[0]] = None
    assert pool_faults(pool, [blocks]) == ["the prefix cache and its blocks disagree"]
