"""The old place of `unified_attention`."""

from aiter.ops.triton.attention.unified_attention import unified_attention as unified_attention
