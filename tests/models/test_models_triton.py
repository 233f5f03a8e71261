"""Models through the Triton kernels, in their interpreter, give PyTorch's logits."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models_support import VOCAB, DenseContext, load, random_settings, reference_model, run
from thread_ranks import TIMEOUT, InterpretedInboxes, ThreadGroup, make_inboxes, one_kernel_at_a_time, run_ranks

from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.models import options
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.layers import contracts
from miniserve.models.loader import load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model
from tools.quantise import KINDS, quantise

pytest.importorskip("triton")
from miniserve.kernels.triton import norm_router, runtime
from miniserve.kernels.triton.small_linear import Chip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no interpreter")


def _through(kernels: runtime.TritonKernels, model: Path, **more: Any) -> CausalLM:
    built_for = BuildOptions(
        dtype=torch.float32, kv_dtype=torch.float32, device=torch.device("cpu"), triton=kernels, **more
    )
    ours = build_model(load_model_config(model), built_for)
    load_weights(ours, model)
    return ours


@pytest.mark.parametrize("splits", [True, False], ids=["nvidia", "amd"])
@pytest.mark.parametrize(
    ("architecture", "groups"), [("Qwen3MoeForCausalLM", {}), ("DeepseekV3ForCausalLM", {"n_group": 1})]
)
def test_experts_chosen_with_the_norm_or_after_it(
    architecture: str, groups: dict[str, int], splits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = random_settings(architecture, 0) | {"num_hidden_layers": 2, "mlp_only_layers": []} | groups
    reference_model(architecture, settings).save_pretrained(tmp_path)
    monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17, splits))
    monkeypatch.setattr(runtime, "choose_tile", lambda *_, **__: None)  # linears in PyTorch, which takes no minute
    kernels = runtime.TritonKernels(torch.device("cpu"))
    ours = _through(kernels, tmp_path)
    plain, generator = load(tmp_path), torch.Generator().manual_seed(0)
    contexts = DenseContext(), DenseContext()
    with mock.patch.object(norm_router, "add_norm_route", wraps=norm_router.add_norm_route) as fused:
        for rows in (1, 3, 6):  # the last is too many for one launch
            chunks = [(row, torch.randint(VOCAB, (1,), generator=generator)) for row in range(rows)]
            got, want = (run(model, ctx, chunks) for model, ctx in zip((ours, plain), contexts, strict=True))
            assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert sorted({len(call.args[0]) for call in fused.call_args_list}) == ([1, 3] if splits else [])


@pytest.mark.parametrize("kind", ["fp8-block", "compressed-dynamic"])
def test_weights_in_8_bits_stay_codes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = random_settings("Qwen3MoeForCausalLM", 0)
    settings |= {"num_hidden_layers": 1, "mlp_only_layers": [], "decoder_sparse_step": 1, "moe_intermediate_size": 64}
    reference_model("Qwen3MoeForCausalLM", settings).save_pretrained(tmp_path / "plain")
    quantise(KINDS[kind], tmp_path / "plain", tmp_path / kind)
    monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17))
    monkeypatch.setattr(runtime, "choose_tile", lambda *_, **__: None)
    ours, plain = _through(runtime.TritonKernels(torch.device("cpu")), tmp_path / kind), load(tmp_path / kind)
    codes = {name for name, each in ours.named_parameters() if each.dtype == torch.float8_e4m3fn}
    names = ("self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.experts.w1", "mlp.experts.w2")
    assert codes == {f"model.layers.0.{name}" for name in names}
    contexts, generator = (DenseContext(), DenseContext()), torch.Generator().manual_seed(0)
    for rows in (1, 3):
        chunks = [(row, torch.randint(VOCAB, (1,), generator=generator)) for row in range(rows)]
        got, want = (run(model, ctx, chunks) for model, ctx in zip((ours, plain), contexts, strict=True))
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_many_rows_round_what_is_multiplied_to_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 3 rows on here: linear layers by the library, experts by the engine's kernel. A row does not depend on what
    is rounded beside it."""
    settings = random_settings("Qwen3MoeForCausalLM", 0) | {"num_hidden_layers": 1, "hidden_size": 128}
    settings |= {"mlp_only_layers": [], "decoder_sparse_step": 1, "moe_intermediate_size": 64, "head_dim": 32}
    reference_model("Qwen3MoeForCausalLM", settings).save_pretrained(tmp_path / "plain")
    quantise(KINDS["compressed-dynamic"], tmp_path / "plain", tmp_path / "fp8")
    monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17))
    monkeypatch.setattr(runtime, "choose_tile", lambda *_, **__: None)
    for name in ("LINEAR", "EXPERTS"):
        table = getattr(contracts, name)
        few = [replace(each, first_row=min(each.first_row, 3), dtypes=()) for each in table]
        monkeypatch.setattr(options, name, tuple(few))
    kernels, platform = runtime.TritonKernels(torch.device("cpu")), NAMED_PLATFORMS["h200"]
    ours, plain = _through(kernels, tmp_path / "fp8", platform=platform), load(tmp_path / "fp8")
    kept = _through(kernels, tmp_path / "fp8", platform=platform, fp8_activations=False)
    chunks = [(row, torch.tensor([7 * row + 1])) for row in range(4)]
    for count, off in ((2, 1e-4), (4, 1e-1)):
        got, unrounded, want = (run(model, DenseContext(), chunks[:count]) for model in (ours, kept, plain))
        assert (unrounded - want).abs().max() < 1e-4 * want.abs().max()
        error = (got - want).abs().max() / want.abs().max()
        assert (error < off) and (error > 1e-3) == (count == 4)
    alone = run(ours, DenseContext(), [chunks[0], *chunks[2:]])
    torch.testing.assert_close(alone, got[[0, 2, 3]], rtol=1e-4, atol=1e-4)


def test_output_and_down_projections_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = random_settings("Qwen3ForCausalLM", 0) | {"attention_bias": False}
    reference_model("Qwen3ForCausalLM", settings).save_pretrained(tmp_path)
    monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17))
    monkeypatch.setattr(runtime, "choose_tile", lambda *_, **__: None)
    kernels = runtime.TritonKernels(torch.device("cpu"))

    def halves(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products = (half @ columns.T for half, columns in zip(x.chunk(2, -1), weight.chunk(2, -1), strict=True))
        return torch.stack(tuple(products), dim=1).flatten(0, 1)

    with mock.patch.object(kernels, "linear_parts", side_effect=halves) as in_parts:
        chunks = [(0, torch.arange(3)), (1, torch.arange(5))]
        got, want = (
            run(_through(kernels, tmp_path), DenseContext(), chunks),
            run(load(tmp_path), DenseContext(), chunks),
        )
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert in_parts.call_count == 2 * settings["num_hidden_layers"]


@pytest.mark.parametrize("by_inbox", [False, True])
def test_ranks_sum_before_the_norm(by_inbox: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are still in parts on each rank, and a router behind a norm that first sums over ranks."""
    settings = random_settings("DeepseekV3ForCausalLM", 0) | {"num_hidden_layers": 1, "n_group": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 24, "first_k_dense_replace": 0}
    reference_model("DeepseekV3ForCausalLM", settings).save_pretrained(tmp_path)
    monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17))
    monkeypatch.setattr(runtime, "choose_tile", lambda *_, **__: None)
    kernels = runtime.TritonKernels(torch.device("cpu"))
    one_kernel_at_a_time(monkeypatch)
    steps = [[(0, torch.arange(3)), (1, torch.arange(2))], [(1, torch.tensor([9]))]]
    memory, inboxes = make_inboxes(2, torch.device("cpu"), limit=2)
    barrier = threading.Barrier(2, timeout=TIMEOUT)
    staged = [InterpretedInboxes(each, barrier) for each in inboxes]

    def logits(group: ThreadGroup) -> list[torch.Tensor]:
        group.inboxes = staged[group.rank] if by_inbox else None
        model = _through(kernels, tmp_path, group=group, expert_parallel=True)
        context = DenseContext()
        return [run(model, context, chunks) for chunks in steps]

    plain, context = load(tmp_path), DenseContext()
    for got, chunks in zip(zip(*run_ranks(2, logits), strict=True), steps, strict=True):
        want = run(plain, context, chunks)
        assert (torch.cat(got, 1) - want).abs().max() < 1e-4 * want.abs().max()
    sums = 2 * settings["num_hidden_layers"] * len(steps) if by_inbox else 0
    assert [each.calls for each in staged] == [sums] * 2 and not any(int(each.state[3]) for each in inboxes)
    del memory  # until here
