"""Which guesses a step verifies, and which of them were right.

Each token of a run is drawn as it would be without speculation, with the random number of its position, and counts if
all guesses before it equal the tokens drawn there. So the tokens are those without speculation. (This is the acceptance
rule of speculative sampling, Leviathan et al. 2023, for guesses without randomness.)
"""

from __future__ import annotations

from collections.abc import Callable

from miniserve.core import DraftRun, SchedulerStats
from miniserve.scheduler.sequence import Sequence


class Speculation:
    """Makes runs of at most `num_draft_tokens` guesses, and counts them in `stats`. A sequence guesses at most one more
    than twice its last right guesses."""

    def __init__(self, num_draft_tokens: int, stats: SchedulerStats) -> None:
        self._num_draft_tokens, self._stats = num_draft_tokens, stats

    def draft(
        self, decoding: list[Sequence], spare_rows: int, find_room: Callable[[Sequence, int], int]
    ) -> list[DraftRun]:
        """A run for each sequence, whose last token is counted as computed already. Guesses share `spare_rows` tokens;
        `find_room(sequence, count)` returns how many of `count` more tokens fit in the KV cache."""
        runs = []
        for index, seq in enumerate(decoding):
            share = -(-spare_rows // (len(decoding) - index))
            count = min(self._num_draft_tokens, seq.guesses_due, share, seq.end - seq.num_computed)
            drafts = seq.drafter.draft(count) if count and seq.drafter is not None else []
            drafts = drafts[: find_room(seq, len(drafts))]
            spare_rows -= len(drafts)
            runs.append(DraftRun(seq.row, seq.num_computed - 1, [seq.token_ids[-1], *drafts]))
        return runs

    def verify(self, runs: list[DraftRun], sampling: list[Sequence], token_ids: list[int]) -> list[bool]:
        """Which of a step's tokens count: in each run those up to and including the first that was not guessed, and all
        tokens outside runs. `sampling` and `token_ids` align with the plan's sampling rows. Positions of right guesses
        are counted as computed."""
        counts = [True] * len(token_ids)
        start = 0
        for run in runs:
            guesses, end = run.token_ids[1:], start + len(run.token_ids)
            right = _common_length(guesses, token_ids[start:end])
            counts[start + right + 1 : end] = [False] * (len(guesses) - right)
            seq = sampling[start]
            seq.num_computed += right
            if guesses:
                seq.guesses_due = 2 * right + 1
            self._stats.num_drafts += bool(guesses)
            self._stats.num_draft_tokens += len(guesses)
            self._stats.num_accepted_tokens += right
            start = end
        return counts


def _common_length(guesses: list[int], found: list[int]) -> int:
    for length, (guess, token_id) in enumerate(zip(guesses, found, strict=False)):
        if guess != token_id:
            return length
    return len(guesses)
