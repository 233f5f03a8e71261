"""Is the bookkeeping of the scheduler and of its block pool consistent?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from miniserve.core import PoolView
from miniserve.scheduler.block_pool import ROOT, BlockPool, sample
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.sequence import Sequence


def check_integrity(scheduler: Scheduler) -> None:
    """Raise `RuntimeError` naming what is inconsistent."""
    running, waiting = list(scheduler._running.values()), list(scheduler._waiting.values())
    faults = [*pool_faults(scheduler._pool, [seq.blocks for seq in running])]
    if {seq.request_id: seq for seq in running + waiting} != scheduler._sequences:
        faults.append("unfinished requests are neither running nor waiting")
    keys = [*(seq.arrival for seq in running), *(seq.order for seq in waiting)]
    if keys != [*scheduler._running, *scheduler._waiting]:
        faults.append("requests are not kept by their arrivals and orders")
    if list(scheduler._waiting) != sorted(scheduler._waiting):
        faults.append("waiting requests are out of order")
    rows = [seq.row for seq in running] + scheduler._free_rows
    all_rows = list(range(scheduler._config.max_num_seqs))
    if sorted(rows) != all_rows or any(seq.row >= 0 or seq.blocks for seq in waiting):
        faults.append("rows are leaked or doubly owned")
    unfinished_prefill = [seq for seq in running if seq.num_computed < seq.prefill_len]
    if unfinished_prefill != scheduler._prefilling or len(unfinished_prefill) > 2:
        faults.append("the sequences in the middle of their prefill are not those noted")
    faults += [fault for seq in running for fault in _sequence_faults(scheduler, seq)]
    faults += _view_faults(scheduler, running)
    if faults:
        raise RuntimeError("The scheduler's state is inconsistent: " + "; ".join(faults) + ".")


def _view_faults(scheduler: Scheduler, running: list[Sequence]) -> Iterable[str]:
    pool = scheduler._pool
    view = scheduler.pool_view(pool.num_blocks // 2 + 1)
    owners = [PoolView.FREE if key is None else PoolView.KEPT for key in pool._keys]
    for seq in running:
        for block in seq.blocks:
            owners[block] = seq.row if owners[block] in (PoolView.FREE, PoolView.KEPT) else PoolView.SHARED
    if view.owners != [owners[block] for block in sample(pool.num_blocks, view.stride)]:
        yield "the view of the pool shows other holders"


def _sequence_faults(scheduler: Scheduler, seq: Sequence) -> Iterable[str]:
    config = scheduler._config
    if not seq.num_computed <= len(seq.blocks) * config.block_size:
        yield f"request {seq.request_id} has no blocks for its {seq.num_computed} computed tokens"
    if not seq.num_registered * config.block_size <= min(seq.num_computed, len(seq.token_ids)):
        yield f"request {seq.request_id} offers blocks to the prefix cache that are not full"
    if config.num_draft_tokens and seq.num_computed > len(seq.token_ids):
        yield f"request {seq.request_id} counts guesses among its {seq.num_computed} computed tokens"


def pool_faults(pool: BlockPool, tables: Iterable[list[int]]) -> list[str]:
    """Sentences on what is inconsistent, given the block tables of all holders."""
    holders = Counter(block for table in tables for block in table)
    faults = [
        f"block {block} counts {refs} holders, has {holders[block]}"
        for block, refs in enumerate(pool._refs)
        if refs != holders[block]
    ]
    unheld = {block for block, refs in enumerate(pool._refs) if not refs}
    if unheld != set(pool._free):
        faults.append(f"leaked or doubly owned blocks: {sorted(unheld ^ set(pool._free))}")
    keys = {key: block for block, key in enumerate(pool._keys) if key is not None}
    if keys != pool._cached:
        faults.append("the prefix cache and its blocks disagree")
    chains = [pool._chains[block] for block in keys.values()]
    if len(set(chains)) != len(chains) or ROOT in chains:
        faults.append("two cached blocks share a chain id")
    return faults
