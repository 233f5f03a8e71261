// The paged KV cache.

#pragma once

#include "cpu_tasks.h"
#include "cpu_vectors.h"

namespace {

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
    share(1, tokens, [=](int64_t t) {
        if (slots[t] < 0) return;
        for (int64_t h = 0; h < cache.kv_heads; h++) {
            cache.write_key(key, slots[t], h, k + t * k_stride + h * cache.head_dim);
            cache.write_value(value, slots[t], h, v + t * v_stride + h * cache.head_dim);
        }
    });
}

}  // namespace
