"""Decode speed on a CPU, compared with transformers and the memory-bandwidth floor in one run.

    python -m benchmarks.cpu_decode --config DIR_WITH_CONFIG_JSON --json result.json

Weights are random, in bfloat16; prompts are random tokens; generation is greedy and ignores EOS. Decode tokens/s are
batch · (n - 1) / (T(n) - T(1)) of two generate calls, for n and for one token: prefill and start-up cancel out. The
engines take turns, each turn in a new process with the same number of threads; figures are medians over the turns. The
floor is the time to read the weights and the cached keys and values once, at the bandwidth of a plain sum over a large
buffer; a model that fits in the CPU's cache may be faster than that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.decode_worker import Engine, Job, Measured
from miniserve.bench.report import header, write_json
from miniserve.core import UserError

BUSY_MACHINE = 0.5  # load over the last minute, before this program adds to it
ENGINES: tuple[Engine, ...] = ("miniserve", "transformers")
SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 8192,
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """Medians over the turns, and decode tokens/s of each turn. Memory: bytes of the peak above what was resident
    before the model was made."""

    decode_tokens_per_s: float
    turns: list[float]
    step_s: float
    first_s: float
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One model at one batch size. `floor_share` is the floor's time divided by miniserve's step time; 1 is best."""

    model: str
    batch: int
    engines: dict[str, EngineFigures]
    weight_bytes: int
    kv_bytes: int
    floor_step_s: float
    ratio: float
    floor_share: float


def run_worker(job: Job) -> Any:
    """The worker's answer to a job. Raises `RuntimeError` with the end of its stderr when it fails."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.decode_worker"]
    done = subprocess.run(command, input=msgspec.json.encode(job), capture_output=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{job.engine} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """In bytes, at bfloat16. `weights` are those a decode step reads: an untied input embedding is not counted, as a
    step needs only a few rows of it. `kv_per_token`: one token's keys and values over all layers."""

    weights: int
    kv_per_token: int
    vocab_size: int


def model_sizes(folder: Path) -> ModelSizes:
    """From a config.json, without making the weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    from_config: Any = AutoModelForCausalLM.from_config  # untyped there
    with torch.device("meta"):
        model = from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    count = sum(parameter.numel() for parameter in model.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSizes(
        weights=2 * (count if embedding is head else count - embedding.numel()),
        kv_per_token=2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim,
        vocab_size=config.vocab_size,
    )


def measure_case(job: Job, turns: int, bandwidth: float, weight_bytes: int, name: str) -> CaseResult:
    """Let the engines take turns at `job`. `bandwidth` in bytes a second."""
    measured: dict[str, list[Measured]] = {engine: [] for engine in ENGINES}
    for turn in range(turns):
        for engine in ENGINES:
            answer = run_worker(msgspec.structs.replace(job, engine=engine, seed=job.seed + turn))
            measured[engine].append(msgspec.convert(answer, Measured))
    figures = {engine: _figures(job, results) for engine, results in measured.items()}
    # Of output_len - 1 decode steps, step i has a context of prompt_len + i: on average prompt_len + output_len / 2.
    kv_bytes = round(job.batch * (job.prompt_len + job.output_len / 2) * job.kv_bytes_per_token)
    floor = (weight_bytes + kv_bytes) / bandwidth
    return CaseResult(
        model=name,
        batch=job.batch,
        engines=figures,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        floor_step_s=floor,
        ratio=figures["miniserve"].decode_tokens_per_s / figures["transformers"].decode_tokens_per_s,
        floor_share=floor / figures["miniserve"].step_s,
    )


def _figures(job: Job, results: list[Measured]) -> EngineFigures:
    steps = [
        statistics.median(whole - first for whole, first in zip(result.whole, result.first, strict=True))
        / (job.output_len - 1)
        for result in results
    ]
    step = statistics.median(steps)
    return EngineFigures(
        decode_tokens_per_s=job.batch / step,
        turns=[job.batch / step for step in steps],
        step_s=step,
        first_s=statistics.median(first for result in results for first in result.first),
        memory=round(statistics.median(result.peak - result.baseline for result in results)),
    )


def print_case(console: Console, case: CaseResult) -> None:
    table = Table(title=f"{case.model}, batch {case.batch}", title_justify="left", title_style="bold")
    for column in ("", "decode tokens/s", "turns", "step ms", "prefill ms", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    for engine, figures in case.engines.items():
        table.add_row(
            engine,
            f"{figures.decode_tokens_per_s:,.1f}",
            " ".join(f"{turn:,.1f}" for turn in figures.turns),
            f"{1000 * figures.step_s:,.2f}",
            f"{1000 * figures.first_s:,.1f}",
            f"{figures.memory / 2**20:,.0f} MiB",
        )
    console.print(table)
    console.print(
        f"{case.ratio:.2f} x transformers; floor {1000 * case.floor_step_s:.2f} ms a step "
        f"({(case.weight_bytes + case.kv_bytes) / 2**20:,.0f} MiB), of which miniserve reaches {case.floor_share:.0%}",
        highlight=False,
    )


def main(
    config: Annotated[Path | None, typer.Option(help="A model's directory; it needs config.json only.")] = None,
    small: Annotated[bool, typer.Option(help="Measure the built-in small Llama shape.")] = True,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated. Default: 1 and 16.")] = None,
    prompt_len: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens to generate, 2 or more.")] = 128,
    turns: Annotated[int, typer.Option(help="Processes per engine; the engines take turns.")] = 3,
    repeats: Annotated[int, typer.Option(help="Measurements in each process.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads per engine; default: all cores.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results here.")] = None,
) -> None:
    """Measure decode on this CPU: miniserve, transformers, and the memory's bandwidth."""
    if output_len < 2 or min(prompt_len, turns, repeats, *(batch or [1])) < 1:
        raise UserError("--output-len must be 2 or more, and the other numbers 1 or more.")
    if config is not None and not (config / "config.json").is_file():
        raise UserError(f"{config} has no config.json; pass a model's directory as --config.")
    threads = threads or len(os.sched_getaffinity(0))
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        models: list[tuple[str, Path]] = [] if config is None else [(config.resolve().name, config)]
        if small:
            (Path(folder) / "config.json").write_text(json.dumps(SMALL_LLAMA))
            models.append(("small Llama", Path(folder)))
        result = header("cpu_decode") | {"threads": threads}
        load = result["machine"]["load_average"]
        if load > BUSY_MACHINE:
            console.print(
                f"Other programs use this machine (load {load:.1f}): do not rely on these figures.", style="yellow"
            )
        bandwidth = float(run_worker(Job(engine="bandwidth", threads=threads)))
        console.print(f"{threads} threads read {bandwidth / 1e9:.1f} GB/s", highlight=False)
        cases = []
        for name, path in models:
            sizes = model_sizes(path)
            for size in batch or [1, 16]:
                job = Job(
                    engine="miniserve",
                    model=str(path),
                    batch=size,
                    prompt_len=prompt_len,
                    output_len=output_len,
                    repeats=repeats,
                    threads=threads,
                    vocab_size=sizes.vocab_size,
                    kv_bytes_per_token=sizes.kv_per_token,
                )
                cases.append(measure_case(job, turns, bandwidth, sizes.weights, name))
                print_case(console, cases[-1])
    if json_path is not None:
        settings = {"prompt_len": prompt_len, "output_len": output_len, "turns": turns, "repeats": repeats}
        measured = {"bandwidth_bytes_per_s": bandwidth, **settings, "cases": list(map(asdict, cases))}
        write_json(json_path, result | measured)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"Error: {error}")
