// Linear layers: out[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]).

#pragma once

#include "cpu_tasks.h"
#include "cpu_vectors.h"

namespace {

#if defined(__AVX512BF16__)
// Weights are packed for vdpbf16ps: panels of 16 output rows, in a panel [k/2][16 rows][2], so that one 64-byte load feeds
// 16 outputs and x comes in as a broadcast pair: no horizontal sums. A tile is NT panels by MT tokens in registers.
constexpr int64_t PANEL = 16;     // output rows of a panel
constexpr int64_t PREFETCH = 1024;  // elements ahead, measured: the hardware prefetcher alone leaves 10 % of the bandwidth

inline __m512bh pair(const bf16* x) {
    int32_t v;
    std::memcpy(&v, x, 4);
    return (__m512bh)_mm512_set1_epi32(v);
}

template <int NT, int MT>
inline void linear_tile(const bf16* w, const bf16* x, const bf16* bias, bf16* out, int64_t k, int64_t x_stride, int64_t out_stride) {
    __m512 acc[NT][MT];
    for (int n = 0; n < NT; n++)
        for (int m = 0; m < MT; m++) acc[n][m] = _mm512_setzero_ps();
    const int64_t panel = k * PANEL;
    for (int64_t i = 0; i < k; i += 2) {
        __m512bh wv[NT];
        for (int n = 0; n < NT; n++) {
            const bf16* p = w + n * panel + i * PANEL;
            wv[n] = (__m512bh)_mm512_loadu_si512(p);
            _mm_prefetch((const char*)(p + PREFETCH), _MM_HINT_T0);
        }
        for (int m = 0; m < MT; m++) {
            __m512bh xv = pair(x + m * x_stride + i);
            for (int n = 0; n < NT; n++) acc[n][m] = _mm512_dpbf16_ps(acc[n][m], wv[n], xv);
        }
    }
    for (int n = 0; n < NT; n++) {
        __m512 b = bias ? _mm512_castsi512_ps(_mm512_slli_epi32(
                              _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(bias + n * PANEL))), 16))
                        : _mm512_setzero_ps();
        for (int m = 0; m < MT; m++)
            _mm256_storeu_si256((__m256i*)(out + m * out_stride + n * PANEL), (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(acc[n][m], b)));
    }
}

template <int NT, int MT>
void linear_panels(const bf16* w, const bf16* x, const bf16* bias, bf16* out, int64_t m, int64_t k, int64_t x_stride, int64_t out_stride) {
    if constexpr (MT > 1) {
        if (m < MT) return linear_panels<NT, MT - 1>(w, x, bias, out, m, k, x_stride, out_stride);
    }
    linear_tile<NT, MT>(w, x, bias, out, k, x_stride, out_stride);
}

template <int NT, int MT>
void linear_packed(const bf16* w, const bf16* x, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k, int64_t x_stride, int threads) {
    const int64_t groups = n / (NT * PANEL), width = NT * PANEL, rest = n / PANEL - groups * NT;
    share(threads, groups + rest, [=](int64_t t) {
        const int64_t p = t < groups ? t * width : groups * width + (t - groups) * PANEL;
        for (int64_t i = 0; i < m; i += MT) {
            const bf16* b = bias ? bias + p : nullptr;
            const int64_t rows = m - i < MT ? m - i : MT;
            if (t < groups) linear_panels<NT, MT>(w + p * k, x + i * x_stride, b, out + i * n + p, rows, k, x_stride, n);
            else linear_panels<1, MT>(w + p * k, x + i * x_stride, b, out + i * n + p, rows, k, x_stride, n);
        }
    });
}
#endif

}  // namespace
