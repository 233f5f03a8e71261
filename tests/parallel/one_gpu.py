"""Ranks as processes that share one GPU, which NCCL refuses and a user cannot ask for: what they exchange all passes
through their inboxes. `python one_gpu.py MODEL [SECONDS]` prints the tokens of two ranks; after so many seconds of
decoding the other rank is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from miniserve.core import Runner, SamplingParams
from miniserve.llm import LLM
from miniserve.parallel.distributed import DistributedGroup
from miniserve.parallel.group import Group, parts_of_all, shard_of
from miniserve.runner import build, ranks
from miniserve.runner.ranked import Progress, RankStart

PROMPTS = [[*range(5, 25)], [*range(40, 47)], [9]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
]


def rows_by_gather(group: Group, x: Tensor, count: int) -> Tensor:
    """As `Group.rows`."""
    widths = [part.size for part in parts_of_all(group, count)]
    whole = group.gather(torch.nn.functional.pad(x, (0, max(widths) - x.shape[1])))
    mine = shard_of(group).part(len(x)).held
    return torch.cat([part[mine, :width] for part, width in zip(whole, widths, strict=True)], dim=1)


def share_one_gpu() -> None:
    """From now on all ranks of this process's engines are on the first GPU."""
    for module in (build, ranks):
        module.rank_device = lambda config, rank: torch.device("cuda", 0)  # type: ignore[attr-defined]
    ranks._find_size = lambda config, source_path: config.tensor_parallel_size or 1  # type: ignore[assignment]
    ranks._BUILDER = "one_gpu:build_rank"
    DistributedGroup.rows = rows_by_gather  # type: ignore[method-assign,assignment]


def build_rank(start: RankStart, progress: Progress) -> Runner:
    share_one_gpu()
    return ranks.build_rank(start, progress)


def tokens(model: str, size: int, params: list[SamplingParams], kill_after: float | None = None) -> list[list[int]]:
    settings = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory": 64 << 20, "max_num_seqs": 4}
    llm = LLM(Path(model), device="cuda", progress=False, tensor_parallel_size=size, **settings)
    if kill_after is not None:
        threading.Timer(kill_after, kill_other_rank).start()
    return [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, params, progress=False)]


def kill_other_rank() -> None:
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"runner.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    share_one_gpu()
    model, *kill_after = sys.argv[1:]
    if kill_after:
        endless = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
        tokens(model, 2, [endless] * 3, float(kill_after[0]))
    else:
        print(json.dumps(tokens(model, 2, PARAMS)), flush=True)
