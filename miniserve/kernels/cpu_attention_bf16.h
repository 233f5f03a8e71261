// The same in bfloat16 over the shuffled layout, with AVX512-BF16.

#pragma once

#include "cpu_attention.h"

namespace {

#if defined(__AVX512BF16__)
inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh repeat_8(const bf16* p) { return (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

// Sixteen sums of four neighbours each, by a transposition of 4 x 4.
inline vec sum_fours(const __m512* x) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    return (vec)_mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), sums);
}

// In bfloat16 over the shuffled layout the dot products run on the cache as it lies: 64 bytes of it are 8 elements of 4 tokens'
// keys, or 4 elements of 8 tokens' values. The weights are rounded to bfloat16 for it (as flash attention does on GPUs). The
// running softmax takes a piece of some blocks a step, and up to four queries of a kv head share what is read.
template <> struct PagedDecode<bf16, true> {
    const Cache<bf16, true>& cache;
    const DecodeShape& s;
    const bf16 *q, *key, *value;
    const int32_t *tables, *seq_lens;
    const float* sinks;
    bf16* out;
    static constexpr int64_t QUERIES = 4, EIGHT = 8;
    const int64_t D = cache.head_dim, BS = cache.block_size, G = s.heads / cache.kv_heads;
    const int64_t blocks = BS < 64 ? 64 / BS : 1, depth = blocks * BS + LANES, sums_width = (D + LANES - 1) / LANES * LANES * 4;

    int64_t scratch_floats() const { return QUERIES * (2 * depth + sums_width) + 4 * depth; }

    // A piece: its blocks' keys and values in one kv head, and [skip, end) of its tokens.
    struct Piece {
        const bf16 *key, *value;
        const int32_t* table;
        int64_t skip, end;
    };
    // Queries: [D] each; scores, weights [depth] each; sums [sums_width] each, four parts of every element.
    struct State {
        const bf16* q;
        float *scores, *sums;
        bf16* weights;
        const bf16** values;  // of each eight tokens of a piece
        __mmask32* seen;
        float top[QUERIES], total[QUERIES];
    };

    template <int N> void score(const Piece& piece, const State& h) const {
        const int64_t step = BS % LANES ? EIGHT : LANES, loads = step / 4;
        for (int64_t t = 0; t < piece.end; t += step) {
            const int64_t place = piece.table[t / BS] * cache.block_elements() + t % BS * 8;
            __m512 acc[N][4] = {};
            for (int64_t d = 0; d < D; d += 8)
                for (int64_t i = 0; i < loads; i++) {
                    const __m512bh k = load_pairs(piece.key + place + d * BS + i * 32);
                    _mm_prefetch((const char*)(piece.value + place + d * BS + i * 32), _MM_HINT_T1);
                    for (int g = 0; g < N; g++) acc[g][i] = _mm512_dpbf16_ps(acc[g][i], k, repeat_8(h.q + g * D + d));
                }
            for (int g = 0; g < N; g++) store16(h.scores + g * depth + t, sum_fours(acc[g]) * s.scale);
        }
    }

    // Scores -> weights relative to the maximum so far; everything summed before is scaled to a new maximum.
    void weigh(const Piece& piece, State& h, int64_t g) const {
        float* p = h.scores + g * depth;
        if (s.softcap)
            for (int64_t t = piece.skip; t < piece.end; t++) p[t] = s.softcap * std::tanh(p[t] / s.softcap);
        for (int64_t t = 0; t < piece.skip; t++) p[t] = -INFINITY;
        for (int64_t t = piece.end; t % LANES; t++) p[t] = -INFINITY;
        __m512 most = _mm512_set1_ps(h.top[g]);
        for (int64_t t = 0; t < piece.end; t += LANES) most = _mm512_max_ps(_mm512_loadu_ps(p + t), most);
        const float high = _mm512_reduce_max_ps(most);
        if (high > h.top[g]) {
            const float shrink = h.total[g] == 0.0f ? 0.0f : exp_neg(h.top[g] - high);
            h.total[g] *= shrink;
            for (int64_t d = 0; d < sums_width; d += LANES) store16(h.sums + g * sums_width + d, load_vec(h.sums + g * sums_width + d) * shrink);
            h.top[g] = high;
        }
        vec total{};
        for (int64_t t = 0; t < piece.end; t += LANES) {
            const vec x = load_vec(p + t), weights = x > -INFINITY ? exp_neg(x - high) : vec{};
            store16(h.weights + g * depth + t, weights);
            total += weights;
        }
        h.total[g] += sum_lanes(total);
    }

    // Elements d .. d + 4 M of N queries' sums += weights times values, of each eight tokens in [from, to).
    template <int N, int M> void add_values(const State& h, int64_t from, int64_t to, int64_t d) const {
        __m512 acc[N][M];
        for (int g = 0; g < N; g++)
            for (int i = 0; i < M; i++) acc[g][i] = _mm512_loadu_ps(h.sums + g * sums_width + d * 4 + i * 16);
        for (int64_t j = from; j < to; j++) {
            __m512bh v[M];
            for (int i = 0; i < M; i++) v[i] = (__m512bh)_mm512_maskz_loadu_epi16(h.seen[j], h.values[j] + d * 8 + i * 32);
            for (int g = 0; g < N; g++) {
                const __m512bh w = repeat_8(h.weights + g * depth + j * EIGHT);
                for (int i = 0; i < M; i++) acc[g][i] = _mm512_dpbf16_ps(acc[g][i], v[i], w);
            }
        }
        for (int g = 0; g < N; g++)
            for (int i = 0; i < M; i++) _mm512_storeu_ps(h.sums + g * sums_width + d * 4 + i * 16, acc[g][i]);
    }

    template <int N> void step(const Piece& piece, State& h) const {
        score<N>(piece, h);
        for (int64_t g = 0; g < N; g++) weigh(piece, h, g);
        const int64_t from = piece.skip / EIGHT, to = (piece.end + EIGHT - 1) / EIGHT;
        for (int64_t j = from; j < to; j++) {
            const int64_t t = j * EIGHT;
            h.values[j] = piece.value + piece.table[t / BS] * cache.block_elements() + t % BS * D;
            // Others are not read: data of the block's earlier owner may not be finite.
            uint32_t seen = 0xff;
            if (t < piece.skip) seen &= 0xffu << (piece.skip - t);
            if (t + EIGHT > piece.end) seen &= 0xffu >> (t + EIGHT - piece.end);
            h.seen[j] = seen * 0x01010101u;
        }
        int64_t d = 0;
        if constexpr (N <= 2)
            for (; d + 32 <= D; d += 32) add_values<N, 8>(h, from, to, d);
        for (; d + 16 <= D; d += 16) add_values<N, 4>(h, from, to, d);
        for (; d < D; d += 8) add_values<N, 2>(h, from, to, d);
    }

    // N queries of a row from the first of them on, all of the same kv head.
    template <int N> void attend(int64_t row, int64_t query, float* scratch) const {
        State h;
        h.q = q + row * s.q_stride + query * D;
        h.values = (const bf16**)scratch;
        h.scores = scratch + 2 * depth;
        h.sums = h.scores + QUERIES * depth;
        h.weights = (bf16*)(h.sums + QUERIES * sums_width);
        h.seen = (__mmask32*)(h.weights + QUERIES * depth);
        std::memset(h.sums, 0, N * sums_width * sizeof(float));
        for (int64_t g = 0; g < N; g++) {
            h.top[g] = sinks ? sinks[query + g] : -INFINITY;
            h.total[g] = sinks ? 1.0f : 0.0f;
        }
        const int64_t len = seq_lens[row], first = s.window && len > s.window ? len - s.window : 0, head = query / G * D * BS;
        for (int64_t b = first / BS; b * BS < len; b += blocks) {
            const int64_t rest = len - b * BS, skip = first > b * BS ? first - b * BS : 0;
            step<N>({key + head, value + head, tables + row * s.table_stride + b, skip, rest < blocks * BS ? rest : blocks * BS}, h);
        }
        for (int64_t g = 0; g < N; g++) {
            const float inverse = h.total[g] > 0.0f ? 1.0f / h.total[g] : 0.0f;
            bf16* o = out + (row * s.heads + query + g) * D;
            const float* sums = h.sums + g * sums_width;
            for_lanes(D, [&](int64_t d, auto, auto put) {
                const __m512 parts[4] = {_mm512_loadu_ps(sums + d * 4), _mm512_loadu_ps(sums + d * 4 + 16), _mm512_loadu_ps(sums + d * 4 + 32),
                                         _mm512_loadu_ps(sums + d * 4 + 48)};
                put(o + d, sum_fours(parts) * inverse);
            });
        }
    }

    void row_heads(int64_t row, int64_t from, int64_t to, float* scratch) const {
        for (int64_t head = from; head < to; head++)
            for (int64_t query = head * G; query < (head + 1) * G; query += QUERIES) switch ((head + 1) * G - query) {
                    case 1: attend<1>(row, query, scratch); break;
                    case 2: attend<2>(row, query, scratch); break;
                    case 3: attend<3>(row, query, scratch); break;
                    default: attend<4>(row, query, scratch);
                }
    }
};
#endif

}  // namespace
