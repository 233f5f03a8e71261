"""The old place of `fused_qk_rope_reshape_and_cache`."""

from aiter.ops.triton.fusions.fused_kv_cache import fused_qk_rope_reshape_and_cache as fused_qk_rope_reshape_and_cache
