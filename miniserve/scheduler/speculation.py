"""Which guesses a step verifies, and which of them were right.

What a guess is worth the model decides: each token of a run is drawn as it would be without speculation, with its own
position's random number, and counts where all guesses before it were the tokens drawn there. So the tokens are those
without speculation. (Speculative sampling, Leviathan et al. 2023, whose acceptance this is for guesses without
randomness.)
"""

from __future__ import annotations

from collections.abc import Callable

from miniserve.core import DraftRun
from miniserve.scheduler.sequence import Sequence


class Speculation:
    """Makes runs of at most `num_draft_tokens` guesses, and counts. A sequence that guessed badly guesses less: next
    time at most twice as many as were right, and one."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def draft(
        self, decoding: list[Sequence], spare_rows: int, find_room: Callable[[Sequence, int], int]
    ) -> list[DraftRun]:
        """A run for each sequence, whose own token is counted as computed. Those that guess share `spare_rows` tokens;
        `find_room` says how many further tokens of a sequence, up to a number, have a place in the cache."""
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
        """Which of a step's tokens count: of each run those up to the first that was not guessed, inclusive, and all
        that are of no run. `sampling` and `token_ids` align with the plan's sampling rows. The right guesses' positions
        become computed ones."""
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
            self.num_drafts += bool(guesses)
            self.num_draft_tokens += len(guesses)
            self.num_accepted_tokens += right
            start = end
        return counts


def _common_length(guesses: list[int], found: list[int]) -> int:
    for length, (guess, token_id) in enumerate(zip(guesses, found, strict=False)):
        if guess != token_id:
            return length
    return len(guesses)
