// The kernels of a CPU's decode step, from a row's next position to its most likely token, for x86-64 and others.
// Plain C functions over raw pointers (see native.py, which binds them); no dependency but OpenMP.

#include <utility>

#include "cpu_attention_bf16.h"
#include "cpu_layers.h"
#include "cpu_linear.h"
#include "cpu_sampling.h"

namespace {

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
    share(threads, n / PANEL, [=](int64_t p) {
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t r = 0; r < PANEL; r++) dst[(p * pairs + i) * PANEL + r] = src[(p * PANEL + r) * pairs + i];
    });
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
    share(rows * row_bytes > 65536 ? threads : 1, rows,
          [=](int64_t r) { std::memcpy((char*)out + r * row_bytes, (const char*)table + ids[r] * row_bytes, row_bytes); });
}

// The rows of a decode step: entry i computes position positions[i] of row rows[i] from the token ids[i]. If `is_explicit` these
// are inputs; else they become the row's next position and last token, and its length grows. Tables are int32 [all rows, width]
// and [entries, width].
void ms_advance(int is_explicit, const int64_t* rows, const int32_t* tables, int64_t* lens, const int64_t* last_tokens, int64_t* ids, int64_t* positions,
                int64_t* slots, int32_t* seq_lens, int32_t* step_tables, int64_t count, int64_t width, int64_t block_size) {
    share(1, count, [=](int64_t i) {
        if (!is_explicit) {
            positions[i] = lens[rows[i]]++;
            ids[i] = last_tokens[rows[i]];
        }
        const int32_t* table = tables + rows[i] * width;
        const int64_t block = positions[i] / block_size;
        slots[i] = table[block] * block_size + positions[i] % block_size;
        seq_lens[i] = int32_t(positions[i] + 1);
        std::memcpy(step_tables + i * width, table, (block + 1) * sizeof(int32_t));
    });
}

// A token for each entry. num_outputs: of each entry; or, with last_tokens, of all rows: then the token is its row's last one from
// now on. With bits, masks of `width` words, the logits of tokens that an entry's mask forbids become -inf; places: the mask of each
// entry, negative where it has none.
void ms_draw(int dtype, void* logits, const uint32_t* bits, const int32_t* places, int64_t width, const int64_t* rows, const int64_t* keys,
             const float* numbers, int64_t* num_outputs, int64_t* tokens, int64_t* last_tokens, int64_t count, int64_t vocab_size, int threads) {
    with_type(dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        share(count * vocab_size > 65536 ? threads : 1, count, [=](int64_t i) {
            if (bits && places[i] >= 0) forbid((T*)logits + i * vocab_size, bits + places[i] * width, vocab_size);
            const int64_t row = rows[i];
            int64_t& outputs = num_outputs[last_tokens ? row : i];
            tokens[i] = draw((const T*)logits + i * vocab_size, vocab_size, numbers + row * NUM_COLUMNS, uniform(keys[row], outputs));
            if (last_tokens) {
                last_tokens[row] = tokens[i];
                outputs++;
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
        {"ms_advance", op<ms_advance>}, {"ms_draw", op<ms_draw>},
    };
    for (const auto& known : OPS)
        if (!std::strcmp(known.name, name)) return known.op;
    return nullptr;
}

// One team for all calls. words: the number of calls, at least, and then the calls.
void ms_replay(const int64_t* words, int64_t count, int threads) {
    const std::unique_ptr<Loop[]> loops(new Loop[words[0]]);
#pragma omp parallel num_threads(threads)
    {
        next_loop = loops.get();
        for (const int64_t* word = words + 1; word < words + count;) word = ((Op)*word)(word + 1);
        next_loop = nullptr;
    }
}
}
