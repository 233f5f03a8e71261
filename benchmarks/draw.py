"""Time to draw tokens on a GPU, compared with PyTorch's ways, in microseconds within a graph: `python -m
benchmarks.draw`.

Logits resemble a model's (a wide bulk and a few hundred likely tokens, bfloat16); the floor is reading them once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from miniserve.kernels.sampling import NUM_COLUMNS, RowParams
from miniserve.kernels.triton.sampling import sample
from miniserve.runner.traffic import measure_bandwidth

VOCAB_SIZE = 151_936
KINDS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.7, 0, 1.0, 0.0),
    "top_k 50": (0.7, 50, 1.0, 0.0),
    "top_k 1000": (1.0, 1000, 1.0, 0.0),
    "top_p 0.9": (0.7, 0, 0.9, 0.0),
    "min_p 0.05": (0.7, 0, 1.0, 0.05),
    "all": (0.7, 50, 0.9, 0.01),
}


def microseconds(work: Callable[[], object], calls: int, replays: int = 15) -> float:
    """Seconds of one call in a graph of `calls`: the median of some replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / calls)
    return sorted(times)[replays // 2]


def ours(logits: torch.Tensor, kind: tuple[float, ...]) -> Callable[[], object]:
    batch, device = len(logits), logits.device
    numbers = torch.zeros(batch, NUM_COLUMNS, device=device)
    numbers[:, : len(kind)] = torch.tensor(kind, device=device)
    rows = torch.arange(batch, device=device)
    params = RowParams(rows * 7919, torch.ones_like(rows), numbers)
    tokens = torch.empty_like(rows)
    return lambda: sample(logits, rows, params, tokens, num_outputs=rows)


def torch_ways(logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    def top_k() -> torch.Tensor:
        values, ids = logits.float().topk(50)
        return ids.gather(1, torch.multinomial((values / 0.7).softmax(-1), 1))

    def top_p() -> torch.Tensor:
        values, ids = (logits.float() / 0.7).sort(-1, descending=True)
        shares = values.softmax(-1)
        return ids.gather(1, torch.multinomial(shares * (shares.cumsum(-1) - shares < 0.9), 1))

    return {
        "torch argmax": lambda: logits.argmax(-1),
        "torch softmax + multinomial": lambda: torch.multinomial((logits.float() / 0.7).softmax(-1), 1),
        "torch topk 50 + multinomial": top_k,
        "torch top_p by a sort": top_p,
    }


def main() -> None:
    device = torch.device("cuda")
    bandwidth = measure_bandwidth(device)
    for batch in (1, 8, 64, 256):
        generator = torch.Generator(device).manual_seed(batch)
        bulk = torch.randn(batch, VOCAB_SIZE, device=device, generator=generator) * 2.5
        likely = torch.randint(0, VOCAB_SIZE, (batch, 300), device=device, generator=generator)
        lead = torch.rand(batch, 300, device=device, generator=generator) * 14
        logits = bulk.scatter_add_(1, likely, lead).to(torch.bfloat16)
        print(f"batch {batch}: floor {1e6 * logits.nbytes / (bandwidth or float('inf')):.1f} us")
        for name, kind in KINDS.items():
            print(f"  {name:30} {microseconds(ours(logits, kind), 20):8.1f} us")
        for name, work in torch_ways(logits).items():
            print(f"  {name:30} {microseconds(work, 4, 5):8.1f} us")


if __name__ == "__main__":
    main()
