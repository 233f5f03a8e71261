from __future__ import annotations

from tools.plot_decode import DOCS, read_ratios


def test_every_row_beside_the_peer_is_drawn() -> None:
    text = (DOCS / "BENCHMARKS.md").read_text(encoding="utf-8")
    ratios = read_ratios(text)
    assert ratios["Qwen3-8B"] == {1: 1.28, 8: 1.19, 32: 1.18, 64: 1.15, 128: 1.12, 256: 1.11}
    assert ratios["Qwen3-30B-A3B"][8] == 1.21  # of a row with two figures for the peer
    assert set(ratios) == {"Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"}
