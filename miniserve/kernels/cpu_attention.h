// Attention of one query token a row over the paged cache, with FlashAttention's running softmax (Dao et al., 2022).

#pragma once

#include <vector>

#include "cpu_cache.h"

namespace {

#if defined(__AVX512BF16__)
constexpr bool HAS_BF16_DOT = true;
inline float dot_bf16(const bf16* a, const bf16* b, int64_t n) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
        odd = _mm512_dpbf16_ps(odd, (__m512bh)_mm512_loadu_si512(a + i + 32), (__m512bh)_mm512_loadu_si512(b + i + 32));
    }
    for (; i < n; i += 32) {
        const __mmask32 mask = n - i >= 32 ? ~__mmask32(0) : (__mmask32(1) << (n - i)) - 1;
        even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i), (__m512bh)_mm512_maskz_loadu_epi16(mask, b + i));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

#else
constexpr bool HAS_BF16_DOT = false;
#endif

// acc[0 .. 16 N) += sum over tokens of p[t] * rows[t], held in registers across the tokens.
template <int N> inline void accumulate(float* acc, const float* p, const float* rows, int64_t from, int64_t to, int64_t stride) {
    vec a[N];
    for (int i = 0; i < N; i++) a[i] = load_vec(acc + i * LANES);
    for (int64_t t = from; t < to; t++)
        for (int i = 0; i < N; i++) a[i] += p[t] * load_vec(rows + t * stride + i * LANES);
    for (int i = 0; i < N; i++) *(vec*)(acc + i * LANES) = a[i];
}

struct DecodeShape {
    int64_t rows, heads, q_stride, table_stride, window;  // window 0: none
    float scale, softcap;                                 // softcap 0: none
};

// The running softmax takes a block a step. A task is a row and a group of kv heads: as many heads together as leaves every thread busy, since a block's heads lie side
// by side. No head's arithmetic depends on the grouping.
template <class T, bool SHUFFLED> struct PagedDecode {
    const Cache<T, SHUFFLED>& cache;
    const DecodeShape& s;
    const T *q, *key, *value;
    const int32_t *tables, *seq_lens;
    const float* sinks;
    T* out;
    const int64_t D = cache.head_dim, BS = cache.block_size, G = s.heads / cache.kv_heads;
    const int64_t width = (D + LANES - 1) / LANES * LANES, depth = BS + LANES;

    int64_t scratch_floats() const { return 2 * depth * width + depth + s.heads * (2 * width + 2); }

    // One head group's state: for each query head the scaled query, the weighted sum, the running maximum and the sum.
    struct Heads {
        const T* raw;
        float *q, *acc, *top, *sum;
    };

    // Scores p[skip .. n) -> weights relative to the maximum so far; everything summed before is scaled to a new maximum.
    void weigh(int64_t g, float high, int64_t skip, int64_t n, const Heads& h, float* p) const {
        if (high > h.top[g]) {
            const float shrink = h.sum[g] == 0.0f ? 0.0f : exp_neg(h.top[g] - high);
            h.sum[g] *= shrink;
            for (int64_t d = 0; d < width; d++) h.acc[g * width + d] *= shrink;
            h.top[g] = high;
        }
        vec total{};
        for (int64_t t = skip; t < n; t += LANES) {  // p has room for a whole vector behind its last token
            vec weights = exp_neg(load_vec(p + t) - high);
            for (int64_t i = n - t; i < LANES; i++) weights[i] = 0.0f;
            store16(p + t, weights);
            total += weights;
        }
        h.sum[g] += sum_lanes(total);
    }

    void block_step(int64_t head, int64_t block, int64_t skip, int64_t n, const Heads& h, float* kf, float* vf, float* p) const {
        constexpr bool direct = std::is_same_v<T, bf16> && HAS_BF16_DOT;
        if (!direct) cache.read_key(key, block, head, n, kf, width);
        cache.read_value(value, block, head, n, vf, width);
        for (int64_t g = 0; g < G; g++) {
            float *acc = h.acc + g * width, high = h.top[g];
            for (int64_t t = skip; t < n; t++) {
                float score;
                if constexpr (direct) {
                    score = dot_bf16(h.raw + g * D, cache.key_row(key, block, t, head), D) * s.scale;
                } else {
                    vec a{};
                    for (int64_t d = 0; d < D; d += LANES) a += load_vec(h.q + g * width + d) * load_vec(kf + t * width + d);
                    score = sum_lanes(a);
                }
                p[t] = s.softcap ? s.softcap * std::tanh(score / s.softcap) : score;
                high = p[t] > high ? p[t] : high;
            }
            weigh(g, high, skip, n, h, p);
            int64_t d = 0;
            for (; d + 4 * LANES <= D; d += 4 * LANES) accumulate<4>(acc + d, p, vf + d, skip, n, width);
            for (; d < D; d += LANES) accumulate<1>(acc + d, p, vf + d, skip, n, width);
        }
    }

    void row_heads(int64_t row, int64_t from, int64_t to, float* scratch) const {
        if (width != D) std::memset(scratch, 0, scratch_floats() * sizeof(float));  // the padding is multiplied, too
        float *kf = scratch, *vf = kf + depth * width, *p = vf + depth * width, *state = p + depth;
        const int64_t count = (to - from) * G, len = seq_lens[row], first = s.window && len > s.window ? len - s.window : 0;
        const T* raw = q + row * s.q_stride + from * G * D;
        float* sums = state + 2 * count * width;
        const Heads all{raw, state, state + count * width, sums, sums + count};
        for (int64_t g = 0; g < count; g++) {
            for (int64_t d = 0; d < width; d++) all.q[g * width + d] = d < D ? load(raw + g * D + d) * s.scale : 0.0f;
            for (int64_t d = 0; d < width; d++) all.acc[g * width + d] = 0.0f;
            all.top[g] = sinks ? sinks[from * G + g] : -INFINITY;
            all.sum[g] = sinks ? 1.0f : 0.0f;
        }
        const int32_t* table = tables + row * s.table_stride;
        for (int64_t b = first / BS; b * BS < len; b++) {
            const int64_t n = len - b * BS < BS ? len - b * BS : BS, skip = first > b * BS ? first - b * BS : 0;
            for (int64_t head = from; head < to; head++) {
                const int64_t i = (head - from) * G;
                const Heads heads{raw + i * D, all.q + i * width, all.acc + i * width, all.top + i, all.sum + i};
                block_step(head, table[b], skip, n, heads, kf, vf, p);
            }
        }
        for (int64_t g = 0; g < count; g++)
            for (int64_t d = 0; d < D; d++)
                store(out + (row * s.heads + from * G + g) * D + d, all.sum[g] > 0.0f ? all.acc[g * width + d] / all.sum[g] : 0.0f);
    }
};

template <class Decode> void paged_decode(const Decode& decode, int threads) {
    const int64_t rows = decode.s.rows, kv_heads = decode.cache.kv_heads;
    int64_t groups = (2 * threads + rows - 1) / rows;
    groups = groups < kv_heads ? groups : kv_heads;
    if (rows >= 2 * threads || threads == 1) groups = 1;
    share(threads, rows * groups, [=](int64_t task) {
        thread_local std::vector<float> scratch;
        if (const size_t size = decode.scratch_floats(); scratch.size() < size) scratch.resize(size);
        const int64_t group = task % groups;
        decode.row_heads(task / groups, group * kv_heads / groups, (group + 1) * kv_heads / groups, scratch.data());
    });
}

}  // namespace
