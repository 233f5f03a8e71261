// The CPU decode path's kernels: small-batch linear layers, norms, rope and paged attention, for x86-64 and others.
// Plain C functions over raw pointers (see native.py, which compiles and binds them); no dependency but OpenMP.
// Every kernel accumulates in float32 whatever the storage type.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// f() on every thread of a team, which shares the loops in it: the team that is at work already (a replay's), or a new one.
template <class F> void team(int threads, F f) {
    if (omp_in_parallel()) return f();
#pragma omp parallel num_threads(threads)
    f();
}

// --- storage types --------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) {
    uint32_t u = uint32_t(p->bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float load(const _Float16* p) { return float(*p); }

inline void store(float* p, float f) { *p = f; }
inline void store(bf16* p, float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    // Round to nearest even; a NaN must not round up into infinity.
    p->bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void store(_Float16* p, float f) { *p = _Float16(f); }

// Sixteen floats; GCC and Clang lower it to whatever vectors the processor has.
typedef float vec __attribute__((vector_size(64), aligned(4)));
constexpr int64_t LANES = 16;

inline vec load_vec(const float* p) { return *(const vec*)p; }
inline float sum_lanes(vec v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}

// Conversions of sixteen elements at a time.
inline vec load16(const float* p) { return load_vec(p); }
inline void store16(float* p, vec v) { *(vec*)p = v; }
#if defined(__AVX512BF16__)
inline vec load16(const bf16* p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void store16(bf16* p, vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
inline vec load16(const bf16* p) {
    vec v;
    for (int64_t i = 0; i < LANES; i++) v[i] = load(p + i);
    return v;
}
inline void store16(bf16* p, vec v) {
    for (int64_t i = 0; i < LANES; i++) store(p + i, v[i]);
}
#endif
inline vec load16(const _Float16* p) {
    vec v;
    for (int64_t i = 0; i < LANES; i++) v[i] = load(p + i);
    return v;
}
inline void store16(_Float16* p, vec v) {
    for (int64_t i = 0; i < LANES; i++) store(p + i, v[i]);
}

// The last n < 16 elements of a row: lanes beyond them are 0 and are not stored.
template <class T> inline vec load_some(const T* p, int64_t n) {
    vec v{};
    for (int64_t i = 0; i < n; i++) v[i] = load(p + i);
    return v;
}
template <class T> inline void store_some(T* p, vec v, int64_t n) {
    for (int64_t i = 0; i < n; i++) store(p + i, v[i]);
}

// f(index, load, store) over a row of n elements, sixteen at a time and then the rest.
template <class F> inline void for_lanes(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        f(i, [](auto* p) { return load16(p); }, [](auto* p, vec v) { store16(p, v); });
    if (const int64_t rest = n - i; rest > 0)
        f(i, [rest](auto* p) { return load_some(p, rest); }, [rest](auto* p, vec v) { store_some(p, v, rest); });
}

template <class T> inline vec rounded(vec v) {
    if constexpr (std::is_same_v<T, float>) return v;
    T t[LANES];
    store16(t, v);
    return load16(t);
}

// exp for x <= 0, relative error about 1e-7 (the polynomial of Cephes' expf).
inline vec exp_neg(vec x) {
    const vec lowest = vec{} - 87.0f;
    x = x < lowest ? lowest : x;
    typedef int32_t ints __attribute__((vector_size(64), aligned(4)));
    const ints exponent = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ints);  // x <= 0: to the nearest
    const vec n = __builtin_convertvector(exponent, vec);
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((exponent + 127) << 23);
}
inline float exp_neg(float x) { return exp_neg(vec{} + x)[0]; }

// --- linear: out[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]) ----------------------------------------------------------

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
    team(threads, [=] {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < groups + rest; t++) {
            const int64_t p = t < groups ? t * width : groups * width + (t - groups) * PANEL;
            for (int64_t i = 0; i < m; i += MT) {
                const bf16* b = bias ? bias + p : nullptr;
                const int64_t rows = m - i < MT ? m - i : MT;
                if (t < groups) linear_panels<NT, MT>(w + p * k, x + i * x_stride, b, out + i * n + p, rows, k, x_stride, n);
                else linear_panels<1, MT>(w + p * k, x + i * x_stride, b, out + i * n + p, rows, k, x_stride, n);
            }
        }
    });
}
#endif

// --- norms, rope, activation ------------------------------------------------------------------------------------------

template <class T> inline void rms_norm_row(const T* x, const T* weight, T* out, int64_t dim, float eps) {
    vec squares{};
    for_lanes(dim, [&](int64_t i, auto get, auto) { squares += get(x + i) * get(x + i); });
    const float inv = 1.0f / std::sqrt(sum_lanes(squares) / float(dim) + eps);
    // Rounding before the weight is applied is what the reference models do.
    for_lanes(dim, [&](int64_t i, auto get, auto put) { put(out + i, rounded<T>(get(x + i) * inv) * get(weight + i)); });
}

template <class T> void add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t dim, float eps, int threads) {
    team(rows * dim > 32768 ? threads : 1, [=] {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T* xr = x + r * dim;
            if (residual) {
                T* rr = residual + r * dim;
                for_lanes(dim, [&](int64_t i, auto get, auto put) { put(rr + i, get(rr + i) + get(xr + i)); });
                xr = rr;
            }
            rms_norm_row(xr, weight, out + r * dim, dim, eps);
        }
    });
}

template <class T> void silu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t dim, int threads) {
    team(rows * dim > 32768 ? threads : 1, [=] {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T *gate = gate_up + r * 2 * dim, *up = gate + dim;
            T* o = out + r * dim;
            for_lanes(dim, [&](int64_t i, auto get, auto put) {
                const vec g = get(gate + i), e = exp_neg(g < 0.0f ? g : -g);
                const vec sigmoid = (g < 0.0f ? e : vec{} + 1.0f) / (1.0f + e);
                put(o + i, rounded<T>(g * sigmoid) * get(up + i));
            });
        }
    });
}

// In place on q and k of a fused qkv row: norm each head (where a weight is given), then rotate its two halves against each
// other (the "neox" pairing). cos_sin: [tokens, head_dim]: cosines of the half, then its sines.
template <class T>
void qk_norm_rope(T* qkv, const T* q_weight, const T* k_weight, const float* cos_sin, int64_t tokens, int64_t heads, int64_t kv_heads,
                  int64_t head_dim, float eps, int64_t row_stride, int threads) {
    const int64_t half = head_dim / 2;
    team(tokens * (heads + kv_heads) * head_dim > 16384 ? threads : 1, [=] {
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < heads + kv_heads; h++) {
                const float *cos = cos_sin + t * head_dim, *sin = cos + half;
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

// --- the paged KV cache ---------------------------------------------------------------------------------------------

// Index formulas of the two layouts; see attention/layouts.py. x is the lane count of the shuffled layout.
template <class T, bool SHUFFLED_> struct Cache {
    static constexpr bool SHUFFLED = SHUFFLED_;
    static constexpr int64_t x = 16 / sizeof(T);
    int64_t kv_heads, head_dim, block_size;

    void read_row(const T* src, float* dst) const {
        for_lanes(head_dim, [&](int64_t i, auto get, auto) { store16(dst + i, get(src + i)); });
    }
    int64_t block_elements() const { return kv_heads * head_dim * block_size; }

    const T* key_row(const T* key, int64_t block, int64_t t, int64_t head) const {
        return key + block * block_elements() + (t * kv_heads + head) * head_dim;
    }
    void write_key(T* key, int64_t slot, int64_t head, const T* src) const {
        const int64_t block = slot / block_size, o = slot % block_size;
        T* base = key + block * block_elements();
        if constexpr (SHUFFLED)
            for (int64_t d = 0; d < head_dim; d += x) std::memcpy(base + head * head_dim * block_size + d * block_size + o * x, src + d, 16);
        else
            std::memcpy(base + (o * kv_heads + head) * head_dim, src, head_dim * sizeof(T));
    }
    void write_value(T* value, int64_t slot, int64_t head, const T* src) const {
        const int64_t block = slot / block_size, o = slot % block_size;
        T* base = value + block * block_elements();
        if constexpr (SHUFFLED)
            for (int64_t d = 0; d < head_dim; d++) base[head * head_dim * block_size + (o / x) * head_dim * x + d * x + o % x] = src[d];
        else
            std::memcpy(base + (o * kv_heads + head) * head_dim, src, head_dim * sizeof(T));
    }
    // The first `n` tokens of a block, one head, as float32 rows [n, width].
    void read_key(const T* key, int64_t block, int64_t head, int64_t n, float* dst, int64_t width) const {
        const T* base = key + block * block_elements();
        if constexpr (SHUFFLED) {
            base += head * head_dim * block_size;
            for (int64_t d = 0; d < head_dim; d += x)
                for (int64_t t = 0; t < n; t++)
                    for (int64_t j = 0; j < x; j++) dst[t * width + d + j] = load(base + d * block_size + t * x + j);
        } else {
            for (int64_t t = 0; t < n; t++) read_row(base + (t * kv_heads + head) * head_dim, dst + t * width);
        }
    }
    void read_value(const T* value, int64_t block, int64_t head, int64_t n, float* dst, int64_t width) const {
        const T* base = value + block * block_elements();
        if constexpr (SHUFFLED) {
            base += head * head_dim * block_size;
            for (int64_t o = 0; o < n; o += x)
                for (int64_t j = 0; j < x; j++)
                    for (int64_t d = 0; d < head_dim; d++) dst[(o + j) * width + d] = load(base + o * head_dim + d * x + j);
        } else {
            for (int64_t t = 0; t < n; t++) read_row(base + (t * kv_heads + head) * head_dim, dst + t * width);
        }
    }
};

template <class T, bool SHUFFLED>
void write_kv(const Cache<T, SHUFFLED>& cache, const T* k, const T* v, int64_t k_stride, int64_t v_stride, T* key, T* value, const int64_t* slots,
              int64_t tokens) {
    team(1, [=] {
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < cache.kv_heads; h++) {
                if (slots[t] < 0) continue;
                cache.write_key(key, slots[t], h, k + t * k_stride + h * cache.head_dim);
                cache.write_value(value, slots[t], h, v + t * v_stride + h * cache.head_dim);
            }
    });
}

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

// One query token a row, attending over the row's blocks; flash-decoding's running softmax (Dao et al., 2022), a block a step.
// A task is a row and a group of kv heads: as many heads together as leaves every thread busy, since a block's heads lie side
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
            for (int64_t d = 0; d < D; d++) {
                store(out + (row * s.heads + from * G + g) * D + d, all.sum[g] > 0.0f ? all.acc[g * width + d] / all.sum[g] : 0.0f);
            }
    }

};

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
            // Others are not read: what an earlier owner of the block left there may not be finite.
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

template <class Decode> void paged_decode(const Decode& decode, int threads) {
    const int64_t rows = decode.s.rows, kv_heads = decode.cache.kv_heads, size = decode.scratch_floats();
    int64_t groups = (2 * threads + rows - 1) / rows;
    groups = groups < kv_heads ? groups : kv_heads;
    if (rows >= 2 * threads || threads == 1) groups = 1;
    team(threads, [&] {
        std::vector<float> scratch(size, 0.0f);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < rows * groups; task++) {
            const int64_t group = task % groups;
            decode.row_heads(task / groups, group * kv_heads / groups, (group + 1) * kv_heads / groups, scratch.data());
        }
    });
}

// --- replay -----------------------------------------------------------------------------------------------------------

// A recorded call as 64-bit words: its op, then its arguments, floats as doubles.
using Op = const int64_t* (*)(const int64_t* arguments);  // returns the words behind its own

template <class A> A argument(int64_t word) {
    if constexpr (std::is_floating_point_v<A>) {
        double real;
        std::memcpy(&real, &word, 8);
        return A(real);
    } else {
        return (A)word;
    }
}

template <class... A, size_t... I> const int64_t* call(void (*kernel)(A...), const int64_t* words, std::index_sequence<I...>) {
    kernel(argument<A>(words[I])...);
    return words + sizeof...(A);
}
template <class... A> const int64_t* call(void (*kernel)(A...), const int64_t* words) { return call(kernel, words, std::index_sequence_for<A...>{}); }

template <auto KERNEL> const int64_t* op(const int64_t* words) { return call(KERNEL, words); }

// Calls `f` with a null pointer of the storage type: 0 float32, 1 bfloat16, 2 float16.
template <class F> void with_type(int dtype, F f) {
    if (dtype == 0) f((float*)nullptr);
    else if (dtype == 1) f((bf16*)nullptr);
    else f((_Float16*)nullptr);
}

}  // namespace

extern "C" {

int ms_has_bf16_dot() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__AVX512BF16__)
void ms_pack_linear(const void* weight, void* packed, int64_t n, int64_t k, int threads) {
    const uint32_t* src = (const uint32_t*)weight;
    uint32_t* dst = (uint32_t*)packed;
    const int64_t pairs = k / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < n / PANEL; p++)
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t r = 0; r < PANEL; r++) dst[(p * pairs + i) * PANEL + r] = src[(p * PANEL + r) * pairs + i];
}

void ms_linear(const void* w, const void* x, const void* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t x_stride, int threads) {
    const bf16 *wp = (const bf16*)w, *xp = (const bf16*)x, *bp = (const bf16*)bias;
    if (m <= 2) linear_packed<8, 2>(wp, xp, bp, (bf16*)out, m, n, k, x_stride, threads);
    else if (m <= 4) linear_packed<4, 4>(wp, xp, bp, (bf16*)out, m, n, k, x_stride, threads);
    else if (m <= 8) linear_packed<2, 8>(wp, xp, bp, (bf16*)out, m, n, k, x_stride, threads);
    else linear_packed<2, 12>(wp, xp, bp, (bf16*)out, m, n, k, x_stride, threads);
}
#endif

void ms_add_rms_norm(int dtype, const void* x, void* residual, const void* weight, void* out, int64_t rows, int64_t dim, float eps, int threads) {
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        add_rms_norm((const T*)x, (T*)residual, (const T*)weight, (T*)out, rows, dim, eps, threads);
    });
}

void ms_silu_and_mul(int dtype, const void* gate_up, void* out, int64_t rows, int64_t dim, int threads) {
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        silu_and_mul((const T*)gate_up, (T*)out, rows, dim, threads);
    });
}

void ms_qk_norm_rope(int dtype, void* qkv, const void* q_weight, const void* k_weight, const float* cos_sin, int64_t tokens, int64_t heads,
                     int64_t kv_heads, int64_t head_dim, float eps, int64_t row_stride, int threads) {
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        qk_norm_rope((T*)qkv, (const T*)q_weight, (const T*)k_weight, cos_sin, tokens, heads, kv_heads, head_dim, eps, row_stride, threads);
    });
}

void ms_write_kv(int dtype, int shuffled, const void* k, const void* v, int64_t k_stride, int64_t v_stride, void* key, void* value,
                 const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t head_dim, int64_t block_size) {
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        if (shuffled) write_kv(Cache<T, true>{kv_heads, head_dim, block_size}, (const T*)k, (const T*)v, k_stride, v_stride, (T*)key, (T*)value, slots, tokens);
        else write_kv(Cache<T, false>{kv_heads, head_dim, block_size}, (const T*)k, (const T*)v, k_stride, v_stride, (T*)key, (T*)value, slots, tokens);
    });
}

void ms_paged_decode(int dtype, int shuffled, const void* q, const void* key, const void* value, const int32_t* tables, const int32_t* seq_lens,
                     const float* sinks, void* out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,
                     int64_t q_stride, int64_t table_stride, int64_t window, float scale, float softcap, int threads) {
    const DecodeShape s{rows, heads, q_stride, table_stride, window, scale, softcap};
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const auto run = [&](auto cache) {
            paged_decode(PagedDecode<T, decltype(cache)::SHUFFLED>{cache, s, (const T*)q, (const T*)key, (const T*)value, tables, seq_lens, sinks, (T*)out}, threads);
        };
        if (shuffled) run(Cache<T, true>{kv_heads, head_dim, block_size});
        else run(Cache<T, false>{kv_heads, head_dim, block_size});
    });
}

void ms_gather_rows(const void* table, const int64_t* ids, void* out, int64_t rows, int64_t row_bytes, int threads) {
    team(rows * row_bytes > 65536 ? threads : 1, [=] {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) std::memcpy((char*)out + r * row_bytes, (const char*)table + ids[r] * row_bytes, row_bytes);
    });
}

// The rows of a decode step: entry i computes position positions[i] of row rows[i] from the token ids[i]; `given`, or else the
// row's next position and last token, and its length grows. Tables are int32 [all rows, width] and [entries, width].
void ms_advance(int given, const int64_t* rows, const int32_t* tables, int64_t* lens, const int64_t* last_tokens, int64_t* ids, int64_t* positions,
                int64_t* slots, int32_t* seq_lens, int32_t* step_tables, int64_t count, int64_t width, int64_t block_size) {
    team(1, [=] {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            if (!given) {
                positions[i] = lens[rows[i]]++;
                ids[i] = last_tokens[rows[i]];
            }
            const int32_t* table = tables + rows[i] * width;
            const int64_t block = positions[i] / block_size;
            slots[i] = table[block] * block_size + positions[i] % block_size;
            seq_lens[i] = int32_t(positions[i] + 1);
            std::memcpy(step_tables + i * width, table, (block + 1) * sizeof(int32_t));
        }
    });
}

// Each entry's most likely token, its row's last one from now on.
void ms_greedy(int dtype, const void* logits, const int64_t* rows, int64_t* tokens, int64_t* last_tokens, int64_t* num_outputs, int64_t count,
               int64_t vocab_size) {
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        team(1, [=] {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                tokens[i] = last_tokens[rows[i]] = argmax((const T*)logits + i * vocab_size, vocab_size);
                num_outputs[rows[i]]++;
            }
        });
    });
}

// The op of a kernel by its name, null for what cannot be recorded.
Op ms_find_op(const char* name) {
    static const struct {
        const char* name;
        Op op;
    } OPS[] = {
#if defined(__AVX512BF16__)
        {"ms_linear", op<ms_linear>},
#endif
        {"ms_add_rms_norm", op<ms_add_rms_norm>}, {"ms_silu_and_mul", op<ms_silu_and_mul>}, {"ms_qk_norm_rope", op<ms_qk_norm_rope>},
        {"ms_write_kv", op<ms_write_kv>}, {"ms_paged_decode", op<ms_paged_decode>}, {"ms_gather_rows", op<ms_gather_rows>},
        {"ms_advance", op<ms_advance>}, {"ms_greedy", op<ms_greedy>},
    };
    for (const auto& known : OPS)
        if (!std::strcmp(known.name, name)) return known.op;
    return nullptr;
}

// One team for all calls: threads meet where a kernel's loop ends instead of being woken for each.
void ms_replay(const int64_t* words, int64_t count, int threads) {
    team(threads, [=] {
        for (const int64_t* word = words; word < words + count;) word = ((Op)*word)(word + 1);
    });
}
}
