// Loops whose turns threads share: of a team made for one loop, or of the one that replays a list of calls.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>

namespace {

// A loop within a replay. A thread goes on to the next loop when all turns of this one are done, by any thread: if another
// process holds a core, the running threads do not wait for the stopped one, unless it was stopped within a turn.
struct alignas(64) Loop {
    std::atomic<int64_t> next{0}, done{0};
};
thread_local Loop* next_loop = nullptr;  // of the replay that this thread takes part in

inline void wait_until_done(const Loop& loop, int64_t turns) {
    for (int64_t spins = 0; loop.done.load(std::memory_order_acquire) < turns; spins++) {
        if (spins > 2000) sched_yield();  // tens of microseconds, longer than turns last
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

// f(0), f(1) ... f(turns - 1), in any order. Every kernel is one such loop.
template <class F> void share(int threads, int64_t turns, F f) {
    if (Loop* loop = next_loop) {
        next_loop++;
        for (int64_t turn; (turn = loop->next.fetch_add(1, std::memory_order_relaxed)) < turns;) {
            f(turn);
            loop->done.fetch_add(1, std::memory_order_release);
        }
        return wait_until_done(*loop, turns);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t turn = 0; turn < turns; turn++) f(turn);
}

}  // namespace
