// What a decoder computes between its matrix products: norms, rope, activation; and the choice of a token.

#pragma once

#include "cpu_tasks.h"
#include "cpu_vectors.h"

namespace {

template <class T> inline void rms_norm_row(const T* x, const T* weight, T* out, int64_t dim, float eps) {
    vec squares{};
    for_lanes(dim, [&](int64_t i, auto get, auto) { squares += get(x + i) * get(x + i); });
    const float inv = 1.0f / std::sqrt(sum_lanes(squares) / float(dim) + eps);
    // Rounding before the weight is applied is what the reference models do.
    for_lanes(dim, [&](int64_t i, auto get, auto put) { put(out + i, rounded<T>(get(x + i) * inv) * get(weight + i)); });
}

template <class T> void add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t dim, float eps, int threads) {
    share(rows * dim > 32768 ? threads : 1, rows, [=](int64_t r) {
        const T* xr = x + r * dim;
        if (residual) {
            T* rr = residual + r * dim;
            for_lanes(dim, [&](int64_t i, auto get, auto put) { put(rr + i, get(rr + i) + get(xr + i)); });
            xr = rr;
        }
        rms_norm_row(xr, weight, out + r * dim, dim, eps);
    });
}

template <class T> void silu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t dim, int threads) {
    share(rows * dim > 32768 ? threads : 1, rows, [=](int64_t r) {
        const T *gate = gate_up + r * 2 * dim, *up = gate + dim;
        T* o = out + r * dim;
        for_lanes(dim, [&](int64_t i, auto get, auto put) {
            const vec g = get(gate + i), e = exp_neg(g < 0.0f ? g : -g);
            const vec sigmoid = (g < 0.0f ? e : vec{} + 1.0f) / (1.0f + e);
            put(o + i, rounded<T>(g * sigmoid) * get(up + i));
        });
    });
}

// In place on q and k of a fused qkv row: norm each head (where a weight is given), then rotate its two halves against each
// other (the "neox" pairing). cos_sin: [tokens, head_dim]: cosines of the half, then its sines.
template <class T>
void qk_norm_rope(T* qkv, const T* q_weight, const T* k_weight, const float* cos_sin, int64_t tokens, int64_t heads, int64_t kv_heads,
                  int64_t head_dim, float eps, int64_t row_stride, int threads) {
    const int64_t half = head_dim / 2;
    share(tokens * (heads + kv_heads) * head_dim > 16384 ? threads : 1, tokens, [=](int64_t t) {
        const float *cos = cos_sin + t * head_dim, *sin = cos + half;
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            T* x = qkv + t * row_stride + h * head_dim;
            const T* weight = h < heads ? q_weight : k_weight;
            if (weight) rms_norm_row(x, weight, x, head_dim, eps);
            for_lanes(half, [&](int64_t i, auto get, auto put) {
                const vec a = get(x + i), b = get(x + half + i), c = get(cos + i), s = get(sin + i);
                put(x + i, a * c - b * s);
                put(x + half + i, b * c + a * s);
            });
        }
    });
}

// The lowest index of the maximum, which a NaN is.
template <class T> int64_t argmax(const T* x, int64_t n) {
    constexpr int64_t BLOCK = 256;
    float best = -INFINITY;
    int64_t at = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        vec top = vec{} - INFINITY;
        auto unordered = top != top;
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) {
            const vec v = load16(x + i);
            top = v > top ? v : top;
            unordered |= v != v;
        }
        float high = -INFINITY;
        bool is_nan = false;
        for (int64_t lane = 0; lane < LANES; lane++) {
            high = top[lane] > high ? top[lane] : high;
            is_nan |= unordered[lane] != 0;
        }
        for (; i < end; i++) {
            high = load(x + i) > high ? load(x + i) : high;
            is_nan |= std::isnan(load(x + i));
        }
        if (is_nan)
            for (i = start;; i++)
                if (std::isnan(load(x + i))) return i;
        if (high > best) {
            best = high;
            at = start;
        }
    }
    while (load(x + at) != best) at++;
    return at;
}

}  // namespace
