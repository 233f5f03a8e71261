"""Weights in 8 bits: every cut of scales against slices of the whole, the formats through the loader, fnuz."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import DenseContext, load, random_settings, reference_model, run
from safetensors.torch import load_file, save_file

from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.description import MoEConfig
from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.experts import Experts, GroupedMoE, expert_matrices
from miniserve.models.layers.linear import PLAIN, Linear, LinearMethod, ScaledMethod
from miniserve.models.layers.weights import LEAST_STEP, ScaledWeights, as_fnuz, placed, spread, step_of, widen_
from miniserve.models.loader import dummy_weights
from miniserve.models.options import BuildOptions
from miniserve.models.quantization import Quantization, Rule, WeightFormat
from miniserve.models.registry import build_model, described_model, weight_bytes
from miniserve.parallel.shard import Part, Shard
from miniserve.runner.memory import check_weights_fit
from tools.quantise import KINDS, quantise, quantised

CPU, CODES = torch.device("cpu"), torch.float8_e4m3fn
FORMATS = {
    "tensor": WeightFormat("tensor"),
    "rows": WeightFormat("rows"),
    "blocks": WeightFormat("blocks", "weight_scale_inv", (128, 128)),
    "low blocks": WeightFormat("blocks", "weight_scale_inv", (64, 96)),
}


class Stored:
    """A checkpoint in memory: matrices of random values by module, in a format."""

    def __init__(self, form: WeightFormat, seed: int) -> None:
        self.form, self.generator = form, torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self.wide: dict[str, torch.Tensor] = {}

    def add(self, module: str, rows: int, columns: int) -> None:
        matrix = torch.randn(rows, columns, generator=self.generator)
        matrix *= torch.rand(rows, 1, generator=self.generator) + 0.1  # so that blocks and rows differ in scale
        codes, scale = quantised(matrix, self.form.grain, self.form.block)
        self.tensors[f"{module}.weight"] = codes
        self.tensors[f"{module}.{self.form.scale}"] = scale if self.form.grain != "tensor" else scale.reshape(())
        n, k = {"tensor": (rows, columns), "rows": (1, columns), "blocks": self.form.block}[self.form.grain]
        grid = scale.reshape(-(-rows // n), -(-columns // k))
        self.wide[module] = codes.float() * grid.repeat_interleave(n, 0)[:rows].repeat_interleave(k, 1)[:, :columns]

    def fill(
        self, layer: Linear | Experts, prefix: str, pieces: Callable[[str], Iterator[Piece]] | None = None
    ) -> None:
        layer.allocate(CPU)
        for piece in (pieces or layer.pieces)(prefix):
            tensor, target = self.tensors[piece.name], layer.target(piece)
            assert tuple(tensor.shape) == piece.shape
            if target.numel():
                target.copy_(tensor[piece.source] if piece.refine is None else piece.refine(tensor))
        layer.finish()


sizes = st.integers(1, 420)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(sorted(FORMATS)), ranks=st.integers(1, 8))
def test_every_cut_of_a_linear_layers_scales_is_a_slice_of_the_whole(data: Any, name: str, ranks: int) -> None:
    """Fused parts and ranks that begin anywhere in a block."""
    form, columns = FORMATS[name], data.draw(sizes)
    heights = data.draw(st.lists(sizes, min_size=1, max_size=3))
    stored = Stored(form, ranks)
    for number, height in enumerate(heights):
        stored.add(f"m.p{number}", height, columns)
    shard = Shard(data.draw(st.integers(0, ranks - 1)), ranks)
    by_columns = data.draw(st.booleans())
    width = shard.part(columns) if by_columns else columns
    parts = [Part(height, slice(0, height)) if by_columns else shard.part(height) for height in heights]
    outputs = {f"p{number}": part for number, part in enumerate(parts)}
    across = slice(None) if isinstance(width, int) else width.held
    want = torch.cat([stored.wide[f"m.p{number}"][part.held, across] for number, part in enumerate(parts)])
    for widened in (False, True):
        weights = ScaledWeights(form, widened=widened)
        layer = Linear(width, outputs, bias=False, dtype=torch.float32, method=LinearMethod(), weights=weights)
        stored.fill(layer, "m.l")
        weight = layer.weight.float()
        if not widened:
            assert layer.weight.dtype == CODES
            weight = weight * spread(layer.weight_scale, weights.steps["weight"], *weight.shape)
        assert torch.equal(weight, want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    hidden=sizes,
    middle=st.integers(1, 300),
    ranks=st.integers(1, 8),
    rank=st.integers(0, 7),
    whole=st.booleans(),
)
def test_every_cut_of_experts_scales_is_a_slice_of_the_whole(
    name: str, hidden: int, middle: int, ranks: int, rank: int, whole: bool
) -> None:
    """By width, or whole experts."""
    form, shard, count = FORMATS[name], Shard(rank % ranks, ranks), 3
    stored = Stored(form, rank)
    for expert in range(count):
        for module in ("gate_proj", "up_proj"):
            stored.add(f"e.{expert}.{module}", middle, hidden)
        stored.add(f"e.{expert}.down_proj", hidden, middle)
    experts = shard.part(count) if whole else Part(count, slice(0, count))
    width = Part(middle, slice(0, middle)) if whole else shard.part(middle)
    weights = ScaledWeights(form, widened=True)
    layer = Experts(experts, hidden, width, dtype=torch.float32, method=_Kept(), weights=weights)
    stored.fill(layer, "e")
    for place, expert in enumerate(range(count)[experts.held]):
        gate, up, down = (stored.wide[f"e.{expert}.{name}"] for name in ("gate_proj", "up_proj", "down_proj"))
        assert torch.equal(layer.w1[place], torch.cat([gate[width.held], up[width.held]]))
        assert torch.equal(layer.w2[place], down[:, width.held])


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers keeps experts: all of a layer in one tensor, ups below gates."""
    apart = re.compile(r"(.*experts)\.(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?")
    found = {name: each for name, each in tensors.items() if not apart.fullmatch(name)}
    experts: dict[str, list[torch.Tensor]] = {}
    for match in sorted(filter(None, map(apart.fullmatch, tensors)), key=lambda match: int(match[2])):
        if match[3] != "up":
            each = tensors[match[0]]
            if match[3] == "gate":
                both = each, tensors[match[0].replace("gate_proj", "up_proj")]
                each = torch.cat([part.view(torch.uint8) if part.dtype.itemsize == 1 else part for part in both])
                each = each.view(both[0].dtype)
            name = "gate_up_proj" if match[3] == "gate" else "down_proj"
            experts.setdefault(f"{match[1]}.{name}{match[4] or ''}", []).append(each)
    return found | {name: torch.stack(each) for name, each in experts.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hidden=sizes, blocks=st.integers(1, 4), ranks=st.integers(1, 8), rank=st.integers(0, 7), whole=st.booleans())
def test_every_cut_of_stacked_experts_scales_is_a_slice_of_the_whole(
    hidden: int, blocks: int, ranks: int, rank: int, whole: bool
) -> None:
    """Those that a rank gets of a stack are those that it gets of the experts one by one."""
    form, shard, count, middle = FORMATS["blocks"], Shard(rank % ranks, ranks), 3, 128 * blocks
    stored = Stored(form, rank)
    for expert in range(count):
        for module in ("gate_proj", "up_proj"):
            stored.add(f"experts.{expert}.{module}", middle, hidden)
        stored.add(f"experts.{expert}.down_proj", hidden, middle)
    experts = shard.part(count) if whole else Part(count, slice(0, count))
    width = Part(middle, slice(0, middle)) if whole else shard.part(middle)
    layers = []
    for tensors, name in ((stored.tensors, "pieces"), (stacked(stored.tensors), "stacked_pieces")):
        weights = ScaledWeights(form)
        layer = Experts(experts, hidden, width, dtype=torch.float32, method=_Kept(), weights=weights)
        stored.tensors = tensors
        stored.fill(layer, "experts", getattr(layer, name))
        layers.append(layer)
    for name, each in layers[0].named_parameters():
        assert torch.equal(each.float(), layers[1].get_parameter(name).float())


class _Kept(GroupedMoE):
    def __init__(self) -> None:
        super().__init__(PLAIN)

    def finish(self, layer: Experts) -> None:
        pass


@pytest.mark.parametrize(
    ("middle", "ranks", "step"), [(1536, 8, 64), (1536, 4, 128), (768, 4, 64), (768, 8, 32), (512, 8, 64)]
)
def test_the_shards_of_known_models_are_fine_enough_for_the_kernels(middle: int, ranks: int, step: int) -> None:
    """Qwen3-235B on 8 GPUs, where engines stop at `192 is not divisible by weight quantization block_n`. The first
    product's columns and the second's rows stay whole: tiles are as wide as a scale's block."""
    assert step >= LEAST_STEP
    for rank in range(ranks):
        weights = ScaledWeights(FORMATS["blocks"])
        weights.declare(Layer(), expert_matrices(4096, Shard(rank, ranks).part(middle)), torch.bfloat16)
        assert weights.steps == {"w1": (step, 128), "w2": (128, step)}


@given(
    kv=st.integers(1, 6), group=st.integers(1, 6), size=st.integers(1, 9), head_dim=st.sampled_from([16, 64, 96, 128]),
    name=st.sampled_from(["blocks", "low blocks"]), width=st.integers(1, 400),
)  # fmt: skip
def test_a_step_is_the_same_on_all_ranks(kv: int, group: int, size: int, head_dim: int, name: str, width: int) -> None:
    """Uneven heads, and KV heads that ranks share: else one rank would widen what others keep."""
    steps, size = set(), min(size, kv * group)
    for shard in (Shard(rank, size) for rank in range(size)):
        q, k = (part.times(head_dim) for part in shard.heads(kv * group, kv))
        middle = shard.part(width)
        gate_up, down = expert_matrices(64, middle).values()
        qkv = placed(64, {"q": q, "k": k, "v": k})
        found = [step_of(FORMATS[name], each.values()) for each in (qkv, placed(q, {"o": 64}), gate_up, down)]
        for step, parts in zip(found, (qkv, placed(q, {"o": 64}), gate_up, down), strict=True):
            assert step is not None
            for part in parts.values():
                assert part.begin % step[0] == part.rows.held.start % step[0] == part.columns.held.start % step[1] == 0
        steps.add(tuple(found))
    assert len(steps) == 1


def test_where_a_step_is_finer_than_kernels_take_the_weight_is_widened() -> None:
    """As if there were Triton's kernels, of which none is called."""
    platform = NAMED_PLATFORMS["h100"]
    for begin, kept in ((32, True), (8, False)):
        quantization = Quantization("fp8", (Rule(("*",), FORMATS["blocks"]),))
        options = BuildOptions(
            torch.bfloat16, torch.bfloat16, torch.device("meta"), platform=platform, quantization=quantization
        )
        layer = options.linear(Part(256, slice(begin, begin + 64)), {"a": 128}, bias=False)
        assert (layer.weight.dtype == CODES) == kept
        assert isinstance(layer.method, ScaledMethod) == kept
        assert layer.weights.widened != kept
        moe = MoEConfig(num_experts=2, top_k=1, intermediate_size=begin + 32, sparse_layers=(True,))
        experts = options.experts_of(moe, 256)
        assert (experts.w1.dtype == CODES, experts.weights.widened) == (kept, not kept)
        assert experts.method.route is not None
        told = experts.method.route.sentence(experts.method.name)
        wide = "the engine's Triton kernels, widened from 8 bits; not by triton experts in 8 bits: scales of 8 × 128"
        assert told.startswith("triton experts in 8 bits from 257 rows on, else triton experts_fp8" if kept else wide)


def test_activations_are_rounded_where_the_checkpoint_and_the_user_allow_it() -> None:
    """On a GPU that multiplies in 8 bits, and in large steps alone."""
    for inputs, wished, refused in (
        (True, True, ""),
        (True, False, "; not by the vendor's library in 8 bits: it rounds activations to 8 bits, and --no-fp8-act"),
        (False, True, "; not by the vendor's library in 8 bits: it rounds activations to 8 bits, and this checkpoint"),
    ):
        quantization = Quantization("fp8", (Rule(("*",), replace(FORMATS["blocks"], inputs=inputs)),))
        options = BuildOptions(
            torch.bfloat16,
            torch.bfloat16,
            torch.device("meta"),
            platform=NAMED_PLATFORMS["h200"],
            fp8_activations=wished,
            quantization=quantization,
        )
        method = options.linear(4096, {"a": 512, "b": 128}, bias=False).method
        assert isinstance(method, ScaledMethod) and method.route is not None
        told = method.route.sentence(method.name)
        assert [method.route.rounds(rows) for rows in (1, 64, 65, 4096)] == [False, False, not refused, not refused]
        assert [kernel and kernel.name for kernel in map(method.route.kernel, (1, 64))] == ["triton linear_fp8"] * 2
        assert refused in told and ("from 65 rows on" in told) == (not refused)


def test_ranks_take_the_same_kernels() -> None:
    """5 and 4 heads of 128: the library would take the columns of the second rank alone."""
    quantization = Quantization("fp8", (Rule(("*",), FORMATS["blocks"]),))
    options = BuildOptions(
        torch.bfloat16, torch.bfloat16, torch.device("meta"), platform=NAMED_PLATFORMS["h200"],
        quantization=quantization,
    )  # fmt: skip
    routes = []
    for rank in range(2):
        heads, _ = Shard(rank, 2).heads(9, 9)
        method = options.linear(heads.times(128), {"o_proj": 4096}, bias=False).method
        assert method.route is not None
        routes.append([kernel.name for kernel in method.route.kernels])
    assert routes[0] == routes[1] == ["triton linear_fp8"]


def test_e4m3fn_codes_mean_the_same_in_fnuz_with_twice_the_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(CODES)
    codes = codes[~codes.float().isnan()].clone()
    want, scale = codes.float() * 0.5, torch.tensor([0.5])
    turned = as_fnuz(codes, scale)
    assert turned.dtype == torch.float8_e4m3fnuz and turned.data_ptr() == codes.data_ptr()
    assert torch.equal(turned.float() * scale, want), "minus zero, which would be NaN, too"


def test_widening_rounds_once() -> None:
    weight, scale = torch.randn(300, 200).to(CODES), torch.rand(3, 2) + 0.1
    wide = weight.bfloat16()
    widen_(wide, scale, (128, 128))
    assert torch.equal(wide, (weight.float() * spread(scale, (128, 128), 300, 200)).bfloat16())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(path: Path, kind: str, architecture: str = "Qwen3ForCausalLM", **changes: Any) -> Path:
    """A random small model in 8 bits; what it means, in float32, lies beside it."""
    plain, wide = path / "plain", path / "wide"
    reference_model(architecture, random_settings(architecture, 0) | changes).save_pretrained(plain)
    quantise(KINDS[kind], plain, path / kind)
    tensors = load_file(path / kind / "model.safetensors")
    for name in [name for name in tensors if tensors[name].dtype == CODES]:
        codes = tensors[name].float()
        scale = tensors[name.removesuffix("weight") + KINDS[kind].scale].float()
        if KINDS[kind].grain == "blocks":
            scale = scale.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
        tensors[name] = codes * scale
    wide.mkdir()
    save_file({name: each for name, each in tensors.items() if "_scale" not in name}, wide / "model.safetensors")
    (wide / "config.json").write_text((plain / "config.json").read_text())
    return path / kind


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_every_kind_is_what_its_scales_say(architecture: str, kind: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, kind, architecture)
    ids = torch.arange(20)
    got, want = (run(load(each), DenseContext(), [(0, ids)]) for each in (path, tmp_path / "wide"))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-ue8m0"])
def test_stacked_experts_as_transformers_keeps_them(kind: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts

    path = checkpoint(tmp_path, kind, "Qwen3MoeForCausalLM", hidden_size=128, moe_intermediate_size=128)
    ids, tensors = torch.arange(20), load_file(path / "model.safetensors")
    want = run(load(path), DenseContext(), [(0, ids)])
    save_file(stacked(tensors), path / "model.safetensors")
    assert torch.equal(run(load(path), DenseContext(), [(0, ids)]), want)

    config = json.loads((path / "config.json").read_text())
    theirs = FP8Experts(
        SimpleNamespace(**config, hidden_activation="silu"),
        block_size=(128, 128),
        scale_fmt=config["quantization_config"].get("scale_fmt", "float"),
    )
    ours = stacked(tensors)
    layer = next(name for name in ours if name.endswith("experts.gate_up_proj")).removesuffix("gate_up_proj")
    for name, each in theirs.state_dict().items():
        assert (ours[layer + name].shape, ours[layer + name].dtype) == (each.shape, each.dtype), name
    widen, wide = Fp8Dequantize(None)._dequantize_one, stacked(load_file(tmp_path / "wide" / "model.safetensors"))
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = ours[layer + name], ours[f"{layer}{name}_scale_inv"]
        assert torch.equal(widen(codes, scales, output_dtype=torch.float32), wide[layer + name])


def test_stacked_experts_whose_ups_begin_within_a_block_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "fp8-block", "Qwen3MoeForCausalLM", moe_intermediate_size=96)
    save_file(stacked(load_file(path / "model.safetensors")), path / "model.safetensors")
    told = refusal(path)
    assert "not part of this architecture: " in told and "experts.gate_up_proj" in told and "missing: " in told


def test_a_scale_of_e8m0_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "fp8-ue8m0")
    scale = load_file(path / "model.safetensors")[f"{K_PROJ}.weight_scale_inv"]
    assert scale.dtype == torch.float8_e8m0fnu
    scale.view(torch.uint8)[-1, -1] = 0xFF
    edit(path, **{f"{K_PROJ}.weight_scale_inv": scale})
    assert f"NaN or infinite values: {K_PROJ}.weight" in refusal(path)


def edit(path: Path, **tensors: torch.Tensor | None) -> None:
    found: dict[str, torch.Tensor | None] = {**load_file(path / "model.safetensors"), **tensors}
    save_file({name: each for name, each in found.items() if each is not None}, path / "model.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        load(path)
    return str(error.value)


K_PROJ = "model.layers.0.self_attn.k_proj"


def test_what_config_and_files_disagree_on_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "fp8-block")
    tensors = load_file(path / "model.safetensors")
    codes, scale = tensors[f"{K_PROJ}.weight"], tensors[f"{K_PROJ}.weight_scale_inv"]
    names = {"w": f"{K_PROJ}.weight", "s": f"{K_PROJ}.weight_scale_inv"}
    edit(path, **{names["w"]: codes.bfloat16()})
    assert f"{names['w']} is stored as BF16, its quantization_config asks for F8_E4M3." in refusal(path)
    edit(path, **{names["w"]: codes, names["s"]: None})
    assert f"missing: {names['s']}." in refusal(path)
    edit(path, **{names["s"]: torch.ones(5, 5)})
    assert f"{names['s']} has shape [5, 5], config.json asks for {list(scale.shape)}" in refusal(path)
    edit(path, **{names["s"]: torch.full_like(scale, torch.nan)})
    assert f"NaN or infinite values: {names['s']}; download" in refusal(path)
    edit(path, **{names["s"]: scale, f"{K_PROJ}.input_scale": torch.ones(())})
    assert f"not part of this architecture: {K_PROJ}.input_scale." in refusal(path), "the config says dynamic"
    edit(path, **{f"{K_PROJ}.input_scale": None})
    load(path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = [K_PROJ]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"k_proj and .* different formats, but they are multiplied as one matrix"):
        load(path)
    names_of_all = [K_PROJ.replace("k_proj", f"{each}_proj") for each in "qkv"]
    config["quantization_config"]["modules_to_not_convert"] = names_of_all
    (path / "config.json").write_text(json.dumps(config))
    assert f"{names['w']} is stored as F8_E4M3, supported are BF16, F16, F32" in refusal(path)
    assert "weight_scale_inv" in refusal(path)


def test_a_code_that_is_no_number_is_named_where_codes_are_kept(tmp_path: Path) -> None:
    from miniserve.models import loader

    codes = torch.arange(256, dtype=torch.uint8).view(CODES)
    numbers = ~codes.float().isnan()
    assert loader._finite(codes[numbers]) and not loader._finite(codes) and loader._finite(codes[:0])
    path = checkpoint(tmp_path, "compressed-dynamic")
    weight = load_file(path / "model.safetensors")[f"{K_PROJ}.weight"]
    weight.view(torch.uint8)[-1, -1] = 0xFF
    edit(path, **{f"{K_PROJ}.weight": weight})
    assert f"NaN or infinite values: {K_PROJ}.weight; download" in refusal(path)


@pytest.mark.parametrize("name", FORMATS)
def test_dummy_weights_in_8_bits_are_as_large_as_others(name: str) -> None:
    weights, outputs = ScaledWeights(FORMATS[name], widened=True), {"a": 300, "b": 100}
    layer = Linear(256, outputs, bias=False, dtype=torch.bfloat16, method=LinearMethod(), weights=weights)
    layer.allocate(CPU)
    layer.fill_dummy("m.l", 1)
    layer.finish()
    assert 0.01 < float(layer.weight.float().std()) < 0.04


def test_a_model_of_dummy_weights_runs(tmp_path: Path) -> None:
    config = load_model_config(checkpoint(tmp_path, "fp8-block", "Qwen3MoeForCausalLM"))
    model = build_model(config, BuildOptions(torch.float32, torch.float32, CPU))
    dummy_weights(model, 1)
    assert run(model, DenseContext(), [(0, torch.arange(12))]).isfinite().all()


def test_a_cpu_without_memory_for_the_widened_weights_says_so(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "fp8-block")
    model = build_model(load_model_config(path), BuildOptions(torch.bfloat16, torch.bfloat16, CPU))
    wide = weight_bytes(model, CPU)
    check_weights_fit(wide, wide, model)
    with pytest.raises(UserError, match=r"its 8 bits are widened to those of --dtype on this device\) and cpu has "):
        check_weights_fit(wide, wide - 1, model)


def test_codes_are_kept_where_kernels_read_them(tmp_path: Path) -> None:
    """As much is counted as is loaded: half of what a CPU needs, and the scales."""
    config = load_model_config(checkpoint(tmp_path, "fp8-block", intermediate_size=256, hidden_size=256))
    kept, wide = (
        weight_bytes(described_model(config, torch.bfloat16, NAMED_PLATFORMS[name]), "cuda") for name in ("h200", "cpu")
    )
    layers = sum(
        each.numel()
        for name, each in described_model(config, torch.bfloat16).named_parameters()
        if name.endswith("_proj.weight")
    )
    assert wide - kept == layers
