"""aiter.ops.rope: rotary embedding by cached cos and sin."""

from __future__ import annotations

import torch
from aiter._rope import rotate
from aiter._standin import check, record, require


def _apply(out, x, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first) -> None:
    require(x.dim() == 4 and cos.dim() == 4, "x must be [s, b, h, d], cos and sin [positions, 1, 1, angles]")
    check(x.stride(-1) == 1 and out.stride(-1) == 1, "rope_cached_positions_fwd_impl requires all stride_d to be 1")
    require(rotate_style in (0, 1) and positions.dtype == torch.int64, "rotate_style is 0 or 1, positions int64")
    require(tuple(positions.shape) == tuple(x.shape[:2]), "positions must be [s, b]")
    require(not positions.numel() or int(positions.max()) < cos.shape[0], "a position outside cos and sin")
    angles = cos.shape[-1]
    turned = angles * 2 if reuse_freqs_front_part else angles
    require(turned <= x.shape[-1], f"cos of {angles} angles turns {turned} dims, heads have {x.shape[-1]}")
    c, s = (t.reshape(-1, angles)[positions][:, :, None] for t in (cos, sin))
    part = slice(x.shape[-1] - turned, None) if nope_first else slice(0, turned)
    result = x.float()
    result[..., part] = rotate(x[..., part], c, s, rotate_style == 0)
    out.copy_(result)


def rope_cached_positions_fwd(
    input, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first, transpose_output=False
):
    """input [s, b, h, d] roped at positions [s, b]; rotate_style 0 NeoX, 1 GPT-J; cos [max, 1, 1, d/2] with
    reuse_freqs_front_part, else [max, 1, 1, d]."""
    record("rope_cached_positions_fwd")
    out = torch.empty_like(input)
    _apply(out, input, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first)
    return out


def rope_cached_positions_2c_fwd(
    input_x, input_y, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first, transpose_output=False
):
    record("rope_cached_positions_2c_fwd")
    outs = torch.empty_like(input_x), torch.empty_like(input_y)
    for out, x in zip(outs, (input_x, input_y), strict=True):
        _apply(out, x, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first)
    return outs


def rope_cached_positions_2c_fwd_inplace(
    input_x, input_y, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first
):
    record("rope_cached_positions_2c_fwd_inplace")
    for x in (input_x, input_y):
        _apply(x, x, cos, sin, positions, rotate_style, reuse_freqs_front_part, nope_first)
