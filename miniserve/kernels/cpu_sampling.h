// The draw of a token from a row of logits, as sampling.py defines it.

#pragma once

#include <algorithm>
#include <vector>

#include "cpu_layers.h"

namespace {

enum { TEMPERATURE, TOP_K, TOP_P, MIN_P, NUM_COLUMNS = 5 };  // of a row's numbers

struct Candidate {
    float logit, weight;
    int64_t id;
};
inline bool is_ahead(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

inline double uniform(uint64_t key, uint64_t position) {
    uint64_t bits = (position * 32 + 1) * 0x9E3779B97F4A7C15u + key;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return double((bits ^ (bits >> 31)) >> 11) * 0x1p-53;
}

// The place of the first weight at which the running sum exceeds the target, never one of weight 0; the last of these where
// rounding has put the target beyond the sum.
template <class F> int64_t first_above(int64_t n, double target, F weight) {
    int64_t last = 0;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double w = weight(i);
        if (w > 0) last = i;
        if ((sum += w) > target && w > 0) break;
    }
    return last;
}

// The logit of the candidate at which the weights, the largest first, sum up to `need`. Halves the candidates that it can be.
inline float nucleus_bar(std::vector<Candidate>& all, double need) {
    auto low = all.begin(), high = all.end();
    while (high - low > 1) {
        const auto middle = low + (high - low) / 2;
        std::nth_element(low, middle, high, is_ahead);
        double sum = 0;
        for (auto c = low; c != middle; c++) sum += c->weight;
        if (sum >= need) high = middle;
        else {
            need -= sum;
            low = middle;
        }
    }
    return low->logit;
}

// What makes logits -infinity, as integers, for which compilers have vectors.
inline uint32_t* whole(float* x) { return (uint32_t*)x; }
inline uint16_t* whole(bf16* x) { return &x->bits; }
inline uint16_t* whole(_Float16* x) { return (uint16_t*)x; }

// The logits of tokens whose bit is not set become -infinity. bits: a word for each 32 logits.
template <class T> void forbid(T* logits, const uint32_t* bits, int64_t n) {
    auto* x = whole(logits);
    T infinity;
    store(&infinity, -INFINITY);
    const auto lowest = *whole(&infinity);
    for (int64_t first = 0; first < n; first += 32) {
        const uint32_t allowed = bits[first / 32];
        auto* word = x + first;
        if (!~allowed) continue;
        if (first + 32 <= n)
            for (int i = 0; i < 32; i++) word[i] = allowed >> i & 1 ? word[i] : lowest;
        else
            for (int i = 0; i < n - first; i++) word[i] = allowed >> i & 1 ? word[i] : lowest;
    }
}

// numbers: of the row. Sums are taken in blocks, in an order that only the vocabulary decides.
template <class T> int64_t draw(const T* x, int64_t n, const float* numbers, double number) {
    constexpr int64_t BLOCK = 64;
    const int64_t best_id = argmax(x, n), blocks = (n + BLOCK - 1) / BLOCK;
    const float best = load(x + best_id), temperature = numbers[TEMPERATURE];
    if (temperature == 0 || !std::isfinite(best)) return best_id;
    thread_local std::vector<float> weights, sums, maxima;
    weights.resize(blocks * BLOCK);
    sums.resize(blocks);
    double total = 0;
    const float scale = 1 / temperature;
    const vec lowest = vec{} - 87.0f;
    for (int64_t b = 0; b < blocks; b++) {
        vec sum{};
        float* w = weights.data() + b * BLOCK;
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            const int64_t rest = n - b * BLOCK - i;
            const vec v = ((rest >= LANES ? load16(x + b * BLOCK + i) : rest > 0 ? load_some(x + b * BLOCK + i, rest) : vec{}) - best) * scale;
            vec e = v > lowest ? exp_neg(v) : vec{};
            for (int64_t lane = rest < 0 ? 0 : rest; lane < LANES; lane++) e[lane] = 0;
            store16(w + i, e);
            sum += e;
        }
        total += sums[b] = sum_lanes(sum);
    }
    const int64_t k = int64_t(numbers[TOP_K]);
    const double top_p = numbers[TOP_P];
    const float min_p = numbers[MIN_P];
    if (k == 0 && top_p >= 1 && min_p == 0) {
        const int64_t block = first_above(blocks, number * total, [&](int64_t b) { return double(sums[b]); });
        double target = number * total;
        for (int64_t b = 0; b < block; b++) target -= sums[b];
        return block * BLOCK + first_above(BLOCK, target, [&](int64_t i) { return double(weights[block * BLOCK + i]); });
    }
    // Tokens that weigh less than `least` are cut off by a filter: by top_k, as so many blocks have a maximum at or above it; by
    // top_p, as they weigh less than an even share of what it cuts off (half of that, for rounding).
    float least = min_p;
    if (k > 0 && k < blocks) {
        maxima.resize(blocks);
        for (int64_t b = 0; b < blocks; b++) maxima[b] = *std::max_element(weights.begin() + b * BLOCK, weights.begin() + (b + 1) * BLOCK);
        std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
        least = std::max(least, maxima[k - 1]);
    } else if (k == 0 && min_p == 0) {
        least = float(0.5 * (1 - top_p) / double(n) * total);
    }
    thread_local std::vector<Candidate> left, order;
    left.clear();
    for (int64_t i = 0; i < n; i++)
        if (weights[i] >= least && weights[i] > 0) left.push_back({load(x + i), weights[i], i});
    order = left;
    Candidate bar{-INFINITY, 0, n};
    if (k > 0 && k < int64_t(order.size())) {
        std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), is_ahead);
        bar = order[k - 1];
        order.resize(k);
    }
    if (top_p < 1) {
        if (k > 0 || min_p > 0) {
            total = 0;
            for (const auto& c : order) total += c.weight;
        }
        if (const float logit = nucleus_bar(order, top_p * total); logit > bar.logit) bar = {logit, 0, n};
    }
    const auto weight = [&](int64_t i) { return is_ahead(bar, left[i]) ? 0 : double(left[i].weight); };
    total = 0;
    for (int64_t i = 0; i < int64_t(left.size()); i++) total += weight(i);
    return left[first_above(int64_t(left.size()), number * total, weight)].id;
}

}  // namespace
