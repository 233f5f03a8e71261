"""One engine's decode speed, measured in a separate process: `cpu_decode` starts it with a job on stdin.

So each engine has clean memory, its own thread pool and none of the other's imports.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from miniserve.core import SamplingParams

Engine = Literal["miniserve", "transformers", "bandwidth"]
BLOCK_SIZE = 16
BANDWIDTH_BYTES = 1 << 30


class Job(msgspec.Struct, kw_only=True, frozen=True):
    """`repeats` pairs of generate calls for `batch` prompts of `prompt_len` random tokens; `model` is a directory with
    a config.json, its weights are made up, in bfloat16. `kv_bytes_per_token`: over all layers."""

    engine: Engine
    model: str = ""
    batch: int = 1
    prompt_len: int = 128
    output_len: int = 128
    repeats: int = 1
    threads: int = 1
    seed: int = 0
    vocab_size: int = 0
    kv_bytes_per_token: int = 0


class Measured(msgspec.Struct, kw_only=True, frozen=True):
    """Seconds of each call for one token (`first`) and for all (`whole`); `baseline` and `peak`: resident bytes before
    the model was made, and at their peak."""

    first: list[float]
    whole: list[float]
    baseline: int
    peak: int


Call = Callable[[list[list[int]], int], None]


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    torch.set_num_threads(job.threads)
    # Engines may print while they load: the answer is the last line.
    answer = measure_bandwidth() if job.engine == "bandwidth" else measure_decode(job)
    print(f"\n{msgspec.json.encode(answer).decode()}", flush=True)


def measure_bandwidth() -> float:
    """Bytes a second that a sum reads from memory, with torch's threads: the best of several."""
    buffer = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return BANDWIDTH_BYTES / best


def measure_decode(job: Job) -> Measured:
    start = _start_miniserve if job.engine == "miniserve" else _start_transformers
    generate, baseline = start(job)
    rng = random.Random(job.seed)

    def timed(output_len: int) -> float:
        # New prompts each time, so that no prefix cache shortens the work.
        prompts = [rng.choices(range(job.vocab_size), k=job.prompt_len) for _ in range(job.batch)]
        start = time.perf_counter()
        generate(prompts, output_len)
        return time.perf_counter() - start

    timed(4)
    pairs = [(timed(1), timed(job.output_len)) for _ in range(job.repeats)]
    return Measured(
        first=[first for first, _ in pairs],
        whole=[whole for _, whole in pairs],
        baseline=baseline,
        peak=_status_bytes("VmHWM"),
    )


def _start_miniserve(job: Job) -> tuple[Call, int]:
    from miniserve import LLM

    baseline = _status_bytes("VmRSS")
    max_model_len = job.prompt_len + job.output_len
    blocks = job.batch * math.ceil((max_model_len + 1) / BLOCK_SIZE) + 8
    llm = LLM(
        job.model,
        load_format="dummy",
        dtype="bfloat16",
        device="cpu",
        max_model_len=max_model_len,
        max_num_seqs=job.batch,
        block_size=BLOCK_SIZE,
        kv_cache_memory=blocks * BLOCK_SIZE * job.kv_bytes_per_token,
    )

    def generate(prompts: list[list[int]], output_len: int) -> None:
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True), progress=False)

    return generate, baseline


def _start_transformers(job: Job) -> tuple[Call, int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    baseline = _status_bytes("VmRSS")
    config = AutoConfig.from_pretrained(job.model)
    torch.manual_seed(job.seed)
    from_config: Any = AutoModelForCausalLM.from_config  # untyped there
    model = from_config(config, dtype=torch.bfloat16).eval()
    # No EOS: the random weights must not decide how much is generated.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_len: int) -> None:
        ids = torch.tensor(prompts)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_len, do_sample=False)
        if output.shape[1] != ids.shape[1] + output_len:
            raise RuntimeError(f"transformers generated {output.shape[1] - ids.shape[1]} tokens, not {output_len}")

    return generate, baseline


def _status_bytes(field: str) -> int:
    """Bytes of this process: VmRSS is resident now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
