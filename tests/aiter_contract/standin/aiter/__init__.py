"""A strict stand-in for AMD's aiter: the real signatures, checked and computed in float32 on the CPU. See `_standin`.

The names below are those that the real `import aiter` puts at the top level and an engine calls.
"""

from . import _standin as _standin
from . import mla as mla
from .ops.activation import silu_and_mul as silu_and_mul
from .ops.attention import get_mla_metadata_info_v1 as get_mla_metadata_info_v1
from .ops.attention import get_mla_metadata_v1 as get_mla_metadata_v1
from .ops.attention import pa_decode_gluon as pa_decode_gluon
from .ops.attention import pa_fwd_asm as pa_fwd_asm
from .ops.attention import paged_attention_common as paged_attention_common
from .ops.attention import paged_attention_rocm as paged_attention_rocm
from .ops.attention import paged_attention_v1 as paged_attention_v1
from .ops.cache import concat_and_cache_mla as concat_and_cache_mla
from .ops.cache import fused_qk_rope_concat_and_cache_mla as fused_qk_rope_concat_and_cache_mla
from .ops.cache import reshape_and_cache as reshape_and_cache
from .ops.cache import reshape_and_cache_flash as reshape_and_cache_flash
from .ops.enum import ActivationType as ActivationType
from .ops.enum import MlaVersion as MlaVersion
from .ops.enum import QuantType as QuantType
from .ops.gemm_op_a8w8 import gemm_a8w8_blockscale as gemm_a8w8_blockscale
from .ops.mha import flash_attn_varlen_func as flash_attn_varlen_func
from .ops.mha import mha_batch_prefill_func as mha_batch_prefill_func
from .ops.moe_op import topk_softmax as topk_softmax
from .ops.rmsnorm import rms_norm as rms_norm
from .ops.rmsnorm import rmsnorm2d_fwd as rmsnorm2d_fwd
from .ops.rmsnorm import rmsnorm2d_fwd_with_add as rmsnorm2d_fwd_with_add
from .ops.rope import rope_cached_positions_2c_fwd as rope_cached_positions_2c_fwd
from .ops.rope import rope_cached_positions_2c_fwd_inplace as rope_cached_positions_2c_fwd_inplace
from .ops.rope import rope_cached_positions_fwd as rope_cached_positions_fwd
from .ops.topk import biased_grouped_topk as biased_grouped_topk
from .ops.topk import grouped_topk as grouped_topk
from .utility import dtypes as dtypes
