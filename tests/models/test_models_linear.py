"""Linear layers: packed weights multiply like plain ones; the plain copy is freed, or kept where it is shared."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from miniserve.models.layers.embedding import Embedding, TiedLMHead
from miniserve.models.layers.linear import (
    ONEDNN,
    PLAIN,
    Linear,
    LinearMethod,
    PackedMethod,
    can_pack,
    choose_packing,
)
from miniserve.models.layers.ops import Ops
from miniserve.parallel.shard import Part, Shard

torch.set_num_threads(1)
CPU = torch.device("cpu")
packable = [dtype for dtype in (torch.bfloat16, torch.float32, torch.float16) if can_pack(dtype)]


def loaded(layer: Linear, seed: int = 0) -> Linear:
    layer.allocate(CPU)
    layer.fill_dummy("layer", seed)
    return layer


@pytest.mark.skipif(not packable, reason="this torch build has no packed CPU weights")
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 64, 500])
@pytest.mark.parametrize("shape", [(96, 64), (101, 35), (1, 17), (640, 256)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", packable)
def test_packed_equals_plain(dtype: torch.dtype, bias: bool, shape: tuple[int, int], rows: int) -> None:
    out_features, in_features = shape
    layer = loaded(Linear(in_features, {"o": out_features}, bias=bias, dtype=dtype, method=PackedMethod(ONEDNN)))
    weight, bias_values = layer.weight.data, layer.bias
    layer.finish()
    assert layer.weight is None
    x = torch.randn(rows, in_features + 8, generator=torch.Generator().manual_seed(1)).to(dtype)[:, :in_features]
    with torch.inference_mode():
        y = layer(x)
    exact = functional.linear(x.double(), weight.double(), None if bias_values is None else bias_values.double())
    assert y.shape == exact.shape
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_plain_method_keeps_the_weight() -> None:
    layer = loaded(Linear(8, {"o": 4}, bias=True, dtype=torch.float32, method=LinearMethod()))
    layer.finish()
    x = torch.ones(2, 8)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("method", [LinearMethod(), PackedMethod(ONEDNN)] if packable else [LinearMethod()])
def test_a_tied_head_multiplies_with_the_embedding_and_leaves_it_there(method: LinearMethod) -> None:
    embedding = Embedding(50, 16, torch.float32, Ops())
    head = TiedLMHead(embedding, 50, dtype=torch.float32, method=method)
    assert list(head.pieces("lm_head")) == []
    embedding.allocate(CPU)
    embedding.fill_dummy("layer", 0)
    head.allocate(CPU)
    head.finish()
    logits = head(embedding(torch.tensor([3, 49])))
    torch.testing.assert_close(logits, embedding.weight[[3, 49]] @ embedding.weight.T)


def test_a_fused_layer_asks_for_each_part_and_places_it_in_its_rows() -> None:
    parts = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    layer = Linear(3, parts, bias=True, dtype=torch.float32, method=LinearMethod())
    layer.allocate(CPU)
    for value, piece in enumerate(layer.pieces("model.layers.0.self_attn.qkv_proj")):
        layer.target(piece).copy_(torch.full(piece.shape, float(value)))
    names = [piece.name for piece in layer.pieces("model.layers.0.self_attn.qkv_proj")]
    prefix = "model.layers.0.self_attn"
    assert names == [f"{prefix}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert layer.weight[:, 0].tolist() == [0.0] * 4 + [2.0] * 2 + [4.0] * 2
    assert layer.bias.tolist() == [1.0] * 4 + [3.0] * 2 + [5.0] * 2


def test_the_method_follows_device_and_dtype() -> None:
    for device in ("meta", "cuda"):
        assert choose_packing(torch.bfloat16, torch.device(device), [(32, 48)], None) is PLAIN
    packed = choose_packing(torch.float32, CPU, [(32, 48)], None) is ONEDNN
    assert packed == can_pack(torch.float32)


def test_without_the_private_operators_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", absent)
    assert not can_pack.__wrapped__(torch.float32)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_hold_slices_of_one_layer(size: int) -> None:
    """Rows, columns, a bias that the first rank alone adds: parts of what one process draws by the same seed."""

    def filled(rows: int | Part, columns: int | Part) -> Linear:
        layer = Linear(columns, {"a": rows, "b": 3}, bias=True, dtype=torch.float32, method=LinearMethod())
        layer.allocate(CPU)
        layer.fill_dummy("layer", 7)
        return layer

    one, x = filled(11, 9), torch.randn(2, 9)
    both = [Shard(rank, size) for rank in range(size)]
    by_rows = [filled(shard.part(11), 9) for shard in both]
    assert torch.equal(torch.cat([layer.weight[:-3] for layer in by_rows]), one.weight[:-3])
    assert torch.equal(torch.cat([layer.bias[:-3] for layer in by_rows]), one.bias[:-3])
    assert all(torch.equal(layer.weight[-3:], one.weight[-3:]) for layer in by_rows)
    by_columns = [filled(11, shard.part(9)) for shard in both]
    assert [layer.bias is None for layer in by_columns] == [rank > 0 for rank in range(size)]
    parts = [layer(x[:, shard.part(9).held]) for layer, shard in zip(by_columns, both, strict=True)]
    torch.testing.assert_close(sum(parts), one(x))
    assert [piece.name for piece in by_columns[-1].pieces("m.l")] == [piece.name for piece in one.pieces("m.l")]
