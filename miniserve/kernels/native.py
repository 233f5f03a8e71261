"""The CPU decode path's kernels, `cpu.cpp`, as methods over torch tensors. If they cannot be compiled everything runs
on PyTorch alone, slower; `unavailable_reason()` says why."""

from __future__ import annotations

import torch

from miniserve.kernels.native_build import Unavailable
from miniserve.kernels.native_calls import call, library
from miniserve.kernels.sampling import RowMasks, RowParams
from miniserve.kernels.step_tensors import RowState, StepTensors

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PANEL = 16  # output rows of a packed panel, as in cpu_linear.h


class NativeKernels:
    """The kernels of `cpu.cpp`. Tensors are CPU tensors of float32, bfloat16 or float16, rows contiguous in their last
    dimension; this is not checked. `has_bf16_dot`: the processor multiplies pairs of bfloat16 (AVX512-BF16), which
    `linear` needs and decode over the shuffled layout uses."""

    def __init__(self, num_threads: int | None = None) -> None:
        """Compile them if necessary, to run on `num_threads` (default: as many as PyTorch). Raises `Unavailable` with
        the reason."""
        self.num_threads = num_threads or torch.get_num_threads()
        self.has_bf16_dot = bool(library().ms_has_bf16_dot())

    def can_pack(self, dtype: torch.dtype, in_features: int, out_features: int) -> bool:
        """Whether `linear` supports a weight [out_features, in_features] of this dtype on this processor."""
        return self.has_bf16_dot and dtype == torch.bfloat16 and out_features % _PANEL == 0 and in_features % 2 == 0

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        """A contiguous weight [n, k] -> the same bytes as panels of 16 rows, which `linear` reads."""
        packed = torch.empty_like(weight)
        call("ms_pack_linear", weight, packed, *weight.shape, self.num_threads)
        return packed

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [m, k] bfloat16 times the packed weight's transpose, plus bias [n] -> [m, n] bfloat16."""
        m, (n, k) = x.shape[0], packed.shape
        out = x.new_empty((m, n))
        call("ms_linear", packed, x, bias, out, m, n, k, x.stride(0), self.num_threads)
        return out

    def gather_rows(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of a contiguous table [n, dim] of any dtype, at ids int64 [rows] -> [rows, dim]."""
        out = table.new_empty((ids.shape[0], table.shape[1]))
        call("ms_gather_rows", table, ids, out, ids.shape[0], table.shape[1] * table.itemsize, self.num_threads)
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm of the rows of a contiguous x [rows, dim]."""
        return self.add_rms_norm(x, None, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += x, in place; returns the norm of the sum. x, residual [rows, dim], contiguous."""
        out = torch.empty_like(x)
        call("ms_add_rms_norm", _DTYPES[x.dtype], x, residual, weight, out, *x.shape, eps, self.num_threads)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of a contiguous [rows, 2 * dim] -> [rows, dim]."""
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, dim))
        call("ms_silu_and_mul", _DTYPES[gate_up.dtype], gate_up, out, rows, dim, self.num_threads)
        return out

    def qk_norm_rope(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos_sin: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        """Norm (if weights are passed) and rotate q and k, in place.

        qkv [tokens, (num_heads + 2 * num_kv_heads) * head_dim]; cos_sin float32 [tokens, head_dim], contiguous: the
        cosines of half a head, then its sines.
        """
        call(
            "ms_qk_norm_rope", _DTYPES[qkv.dtype], qkv, q_weight, k_weight, cos_sin, qkv.shape[0],
            num_heads, num_kv_heads, head_dim, eps, qkv.stride(0), self.num_threads,
        )  # fmt: skip

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_size: int,
        shuffled: bool,
    ) -> None:
        """Store k, v [tokens, num_kv_heads, head_dim] (token stride free) at slot_mapping int64 [tokens], skipping
        negative slots."""
        tokens, num_kv_heads, head_dim = k.shape
        call(
            "ms_write_kv", _DTYPES[k.dtype], int(shuffled), k, v, k.stride(0), v.stride(0), key, value, slot_mapping,
            tokens, num_kv_heads, head_dim, block_size,
        )  # fmt: skip

    def paged_decode(
        self,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        num_kv_heads: int,
        block_size: int,
        shuffled: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One query token a row: q [rows, num_heads, head_dim] (token stride free), block_tables int32 [rows, width],
        seq_lens int32 [rows] counting the query's own token -> [rows, num_heads * head_dim]."""
        rows, num_heads, head_dim = q.shape
        out = q.new_empty((rows, num_heads * head_dim))
        call(
            "ms_paged_decode", _DTYPES[q.dtype], int(shuffled), q, key, value, block_tables, seq_lens, sinks, out,
            rows, num_heads, num_kv_heads, head_dim, block_size, q.stride(0), block_tables.stride(0), window or 0,
            scale, softcap or 0.0, self.num_threads,
        )  # fmt: skip
        return out

    def advance(self, state: RowState, step: StepTensors, block_size: int, *, explicit: bool) -> None:
        """Fill `step` for its rows, of which each gets longer by its last token; if `explicit`, the host has set
        positions and input_ids, too, and lens do not change."""
        call(
            "ms_advance", int(explicit), step.rows, state.tables, state.lens, state.last_tokens, step.input_ids,
            step.positions, step.slots, step.seq_lens, step.block_tables, len(step.rows), state.tables.shape[1],
            block_size,
        )  # fmt: skip

    def draw(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        params: RowParams,
        num_outputs: torch.Tensor,
        masks: RowMasks | None = None,
    ) -> torch.Tensor:
        """See `sampling.Draw`."""
        tokens = torch.empty_like(rows)
        self._draw(logits, rows, params, num_outputs, tokens, None, masks)
        return tokens

    def draw_next(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        params: RowParams,
        state: RowState,
        tokens: torch.Tensor,
        masks: RowMasks | None = None,
    ) -> None:
        """As `draw`, into `tokens` int64 [batch] and the rows' last tokens; counts one more output for them."""
        self._draw(logits, rows, params, state.num_outputs, tokens, state.last_tokens, masks)

    def _draw(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        params: RowParams,
        num_outputs: torch.Tensor,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor | None,
        masks: RowMasks | None,
    ) -> None:
        allowed = (None, None, 0) if masks is None else (masks.bits, masks.places, masks.bits.shape[1])
        call(
            "ms_draw", _DTYPES[logits.dtype], logits, *allowed, rows, params.keys, params.numbers, num_outputs, tokens,
            last_tokens, *logits.shape, self.num_threads,
        )  # fmt: skip


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used here, as a sentence; None if they can."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None
