"""`miniserve explain`: which attention a model would use on some hardware, and why."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miniserve.cli.settings import with_settings
from miniserve.config import EngineConfig

if TYPE_CHECKING:
    from miniserve.attention.spec import AttentionSpec
    from miniserve.checks.explanation import Explanation, Memory, Path


@with_settings(
    only=(
        "model", "revision", "kv_layout", "kv_cache_dtype", "attention_backend", "aiter", "fp8_activations",
        "block_size", "dtype", "max_model_len", "tensor_parallel_size", "enable_expert_parallel",
    ),
)  # fmt: skip
def explain(
    engine: EngineConfig,
    device: Annotated[str, typer.Option(help="mi300x, mi355x, h100, cpu, …; auto: this machine.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which attention backend, KV layout and kernels a model would use, why not others, and what fits in memory.

    Only the model's config.json is needed.
    """
    # Here and not above: torch would slow down `miniserve --help`.
    from miniserve.checks.explanation import explain as explain_model
    from miniserve.models.config import describe_model
    from miniserve.models.hub import locate_config

    name, path = locate_config(engine.model, engine.revision, notify=lambda sentence: print(sentence, file=sys.stderr))
    found = explain_model(name, describe_model(path, name), engine, device)
    print(json.dumps(to_json(found), indent=2) if as_json else to_text(found))


def to_text(found: Explanation) -> str:
    """For people; lines are not wrapped."""
    facts, platform = to_json(found), found.choice.platform
    chosen, others = facts["chosen"], []
    for path in facts["possible"]:
        if (path["backend"], path["layout"]) != (chosen["backend"], chosen["layout"]):
            others += [f"  {_where(path)}", *(f"    {line}" for line in path["kernels"])]
    units = f", {platform.compute_units} compute units" if platform.compute_units else ""
    memory = f", {_gib(found.memory.total)}" if found.memory.total else ""
    lines = [
        f"{found.model}: {found.config.architecture}, {found.config.num_layers} layers",
        f"on {found.device}: {platform.arch}{units}{memory}",
        *(f"note: {note}" for note in found.notes),
        "",
        f"attention layers{f', on each of {found.tp} {platform.holder}s' if found.tp > 1 else ''}",
        *(f"  {ranges(kind.layers)}: {kind_text(kind.spec)}" for kind in found.kinds),
        "",
        f"chosen: {chosen['backend']} over the {chosen['layout']} KV layout: {chosen['reason']}",
        *(f"  {line}" for line in (*chosen["kernels"], *chosen["products"])),
        "",
        "also possible",
        *(others or ["  nothing else"]),
        "",
        "not possible",
        *(f"  {_where(path)}: {reason}" for path in facts["impossible"] for reason in path["reasons"]),
        "",
        *_memory(found),
        *_floors(found),
    ]
    return "\n".join(lines)


def to_json(found: Explanation) -> dict[str, Any]:
    """The same as data."""
    choice, memory = found.choice, found.memory
    places = [(path, {"backend": path.backend, "layout": path.layout or None}) for path in found.paths]
    possible = [place | {"kernels": _kernels(found, path)} for path, place in places if not path.reasons]
    chosen = {"backend": choice.backend, "layout": choice.layout}
    return {
        "model": found.model,
        "architecture": found.config.architecture,
        "device": found.device,
        "arch": choice.platform.arch,
        "tensor_parallel_size": found.tp,
        "enable_expert_parallel": found.expert_parallel,
        "notes": list(found.notes),
        "layers": [{"layers": list(kind.layers), "attention": kind_text(kind.spec)} for kind in found.kinds],
        "chosen": {
            **chosen,
            "reason": choice.reason,
            "kernels": next(path["kernels"] for path in possible if chosen.items() <= path.items()),
            "products": list(found.products),
        },
        "possible": possible,
        "impossible": [place | {"reasons": list(path.reasons)} for path, place in places if path.reasons],
        "memory_bytes": {
            "total": memory.total,
            "usable": memory.usable,
            "weights": memory.weights,
            "scratch": memory.scratch,
            "kv_per_token": memory.kv_bytes_per_token,
        },
        "step_floor_s": {str(rows): floor for rows, floor in found.floors.items()},
        "kv_tokens": memory.tokens,
        "kv_tokens_bounded": memory.bounded,
        "block_size": choice.block_size,
        "max_model_len": found.max_model_len,
    }


def kind_text(spec: AttentionSpec | None) -> str:
    """One kind of layer's attention in a few words."""
    if spec is None:
        return "linear attention, without KV cache"
    dtype, kv_dtype = (str(each).removeprefix("torch.") for each in (spec.dtype, spec.kv_dtype))
    if (latent := spec.latent) is not None:
        heads = f"{_count(spec.num_heads, 'head')} over a latent of {latent.kv_lora_rank} + {latent.rope_dim}"
    else:
        heads = f"{_count(spec.num_heads, 'head')} / {_count(spec.num_kv_heads, 'KV head')} × {spec.head_dim}"
    more = [f"window {spec.sliding_window}"] if spec.sliding_window is not None else []
    more += [f"softcap {spec.softcap:g}"] if spec.softcap is not None else []
    more += ["sinks"] if spec.sinks else []
    if latent is not None:
        more += [f"scale {spec.scale:.4g}"]
    return ", ".join([heads, *more, dtype if dtype == kv_dtype else f"{dtype}, KV cache {kv_dtype}"])


def ranges(layers: tuple[int, ...]) -> str:
    """`layers 0-93`; `layers 0, 2, 4, … 34 (18)` where they alternate."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    step = layers[1] - layers[0]
    if step == 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]}-{layers[-1]}"
    shown = ", ".join(map(str, layers[:3]))
    return f"layers {shown}" if len(layers) <= 3 else f"layers {shown}, … {layers[-1]} ({len(layers)})"


def _kernels(found: Explanation, path: Path) -> list[str]:
    from miniserve.attention.routes import describe_route

    kinds = [kind for kind in found.kinds if kind.spec is not None]
    lines = []
    for kind, route in zip(kinds, path.routes, strict=True):
        if kind.spec is not None:
            which = "" if len(kinds) == 1 else f"{ranges(kind.layers)}: "
            lines.append(f"{which}{describe_route(route, kind.spec, found.choice.platform)}")
    return lines


def _where(path: dict[str, Any]) -> str:
    layout = f" over {path['layout']}" if path["layout"] else ""
    return f"{path['backend']}{layout}"


def _memory(found: Explanation) -> list[str]:
    memory, layout = found.memory, found.choice.kv_layout
    lines = [f"KV cache: {layout.name}, blocks of {layout.block_size} tokens"]
    for kind in found.kinds:
        if kind.spec is not None:
            shapes = [" × ".join(map(str, shape[1:])) for shape in layout.shapes(kind.spec, 1)]
            planes = ("one plane of [{}]" if len(shapes) == 1 else "keys [{}], values [{}]").format(*shapes)
            lines.append(f"  {ranges(kind.layers)}: a block is {layout.block_bytes(kind.spec):,} bytes: {planes}")
    lines.append(f"memory{f' of each {found.choice.platform.holder}' if found.tp > 1 else ''}")
    weights = "unknown for this quantisation" if memory.weights is None else _gib(memory.weights)
    lines.append(f"  weights: {weights}")
    lines += [f"  scratch of the backend: {_gib(memory.scratch)}"] if memory.scratch else []
    lines.append(f"  KV cache: {memory.kv_bytes_per_token:,} bytes a token")
    return lines + _capacity(memory, found.max_model_len)


def _floors(found: Explanation) -> list[str]:
    from miniserve.checks.explanation import CONTEXT, SUM_SECONDS
    from miniserve.engine.roofline import shares

    if not found.floors:
        return []
    sums = f", and {found.num_sums} sums over ranks of {1e6 * SUM_SECONDS:.1f} µs" if found.num_sums else ""
    lines = [
        f"a decode step takes at least, by {found.bandwidth / 1e12:.1f} TB/s at {CONTEXT:,} tokens of context{sums}"
    ]
    for rows, floor in found.floors.items():
        lines.append(f"  {_count(rows, 'row')}: {1e3 * sum(floor.values()):.2f} ms: {shares(floor)}")
    return lines


def _capacity(memory: Memory, longest: int) -> list[str]:
    if memory.tokens is None or memory.usable is None or memory.total is None:
        return []
    share = f"{memory.usable / memory.total:.0%} of {_gib(memory.total)}"
    if memory.tokens == 0:
        remedy = (
            f"the weights need --tensor-parallel-size {memory.least_tp}"
            if memory.least_tp
            else "the weights are too large"
        )
        return [f"  no room for tokens in {share}: {remedy}"]
    sequences = memory.tokens / longest
    lines = [f"  room for {memory.tokens:,} tokens in {share}: {sequences:.1f} sequences of {longest:,}"]
    return lines + ([f"  {memory.bounded}"] if memory.bounded else [])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
