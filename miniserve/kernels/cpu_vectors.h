// Storage types and vectors of sixteen floats. Every kernel accumulates in float32 whatever the storage type.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

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

// Calls `f` with a null pointer of the storage type: 0 float32, 1 bfloat16, 2 float16.
template <class F> void with_type(int dtype, F f) {
    if (dtype == 0) f((float*)nullptr);
    else if (dtype == 1) f((bf16*)nullptr);
    else f((_Float16*)nullptr);
}

}  // namespace
