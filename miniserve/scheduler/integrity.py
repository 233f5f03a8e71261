"""Is the scheduler's bookkeeping consistent? For tests and idle times: costs O(blocks)."""

from __future__ import annotations

from miniserve.config import SchedulerConfig
from miniserve.scheduler.block_pool import BlockPool
from miniserve.scheduler.sequence import Sequence


def find_faults(
    config: SchedulerConfig,
    pool: BlockPool,
    running: list[Sequence],
    waiting: list[Sequence],
    prefilling: Sequence | None,
    free_rows: list[int],
) -> list[str]:
    """Sentences on what is inconsistent."""
    faults = pool.find_faults([seq.blocks for seq in running])
    arrivals = [seq.arrival for seq in running + waiting]
    if arrivals != sorted(set(arrivals)):
        faults.append("requests are out of order")
    rows = [seq.row for seq in running] + free_rows
    if sorted(rows) != list(range(config.max_num_seqs)) or any(seq.row >= 0 or seq.blocks for seq in waiting):
        faults.append("rows are leaked or doubly owned")
    for seq in running:
        if not seq.num_computed <= len(seq.blocks) * config.block_size:
            faults.append(f"request {seq.request_id} has no blocks for its {seq.num_computed} computed tokens")
        if not seq.num_registered * config.block_size <= min(seq.num_computed, len(seq.token_ids)):
            faults.append(f"request {seq.request_id} offers blocks to the prefix cache that are not full")
        if config.num_draft_tokens and seq.num_computed > len(seq.token_ids):
            faults.append(f"request {seq.request_id} counts guesses among its {seq.num_computed} computed tokens")
    unfinished_prefill = [seq for seq in running if seq.num_computed < seq.prefill_len]
    if unfinished_prefill != ([] if prefilling is None else [prefilling]):
        faults.append("the sequence in the middle of its prefill is not the one noted")
    return faults
