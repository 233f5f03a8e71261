"""aiter.ops.attention."""

from aiter._asm import pa_fwd_asm as pa_fwd_asm
from aiter._mla_metadata import get_mla_metadata_info_v1 as get_mla_metadata_info_v1
from aiter._mla_metadata import get_mla_metadata_v1 as get_mla_metadata_v1
from aiter._paged import _should_use_asm_kernel as _should_use_asm_kernel
from aiter._paged import paged_attention_common as paged_attention_common
from aiter._paged import paged_attention_rocm as paged_attention_rocm
from aiter._paged import paged_attention_v1 as paged_attention_v1
from aiter.ops.triton.gluon.pa_decode_gluon import pa_decode_gluon as pa_decode_gluon
