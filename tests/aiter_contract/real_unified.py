"""Run as a program: the engine's backend over the real `unified_attention` of a checkout of aiter (AITER_SRC), in
Triton's interpreter on a CPU, against attention in float64. Prints a line for each step that agreed."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from attention_steps import make_step
from emulation import torch_kernels
from real_aiter import make_importable

from miniserve.attention.aiter import Aiter
from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.rocm_unified import UnifiedBackend
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import LayerRoute

FP16 = torch.float16
PLAIN = AttentionSpec(8, 2, 64, 0.2, FP16, FP16)
SPECS = {
    "plain": PLAIN,
    "head_dim 128": replace(PLAIN, head_dim=128, num_heads=4),
    "window": replace(PLAIN, sliding_window=33),
    "sinks": replace(PLAIN, sinks=True),
    "softcap": replace(PLAIN, softcap=5.0),
    "group of 17": replace(PLAIN, num_heads=17, num_kv_heads=1),
}
# Decode rows, chunks with context and without; the long ones are for the kernel that splits rows.
SHORT, LONG = [(0, 1), (15, 1), (16, 1), (300, 1), (20, 17), (0, 30)], [(600, 1), (0, 1), (530, 5)]
DECODES = [row for row in SHORT if row[1] == 1]


def main() -> None:
    make_importable("gfx942")
    from aiter.ops.triton.attention.unified_attention import unified_attention

    for layout_name in ("linear", "shuffled"):
        for name, spec in SPECS.items():
            for rows in (SHORT, LONG, DECODES) if name in ("plain", "sinks") else (SHORT,):
                decodes = sum(new == 1 for _, new in rows)
                step = make_step((spec, 16, rows, decodes), layout_name, 7)
                unused = dict.fromkeys(Aiter.__dataclass_fields__)
                aiter = Aiter(**unused | {"unified_attention": unified_attention})
                options = BackendOptions(
                    specs=(spec,),
                    routes=(LayerRoute("unified_attention", "unified_attention"),),
                    platform=NAMED_PLATFORMS["mi300x"],
                    device=torch.device("cpu"),
                    max_rows=8,
                    max_seq_len=1024,
                )
                with torch_kernels(), patch("miniserve.attention.aiter.load", lambda known=aiter: known):
                    backend = UnifiedBackend(step.layout, options)
                for each in (step,) if step.batch.chunks else (step, step.padded()):
                    each.check(backend)
                print("agrees:", layout_name, name, f"up to {max(map(sum, rows))} tokens", flush=True)


if __name__ == "__main__":
    main()
