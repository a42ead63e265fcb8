// Operations of several threads of a warp or of a block: barriers, shuffles, votes, atomics.
#pragma once

namespace emulation {

template <typename T>
struct Shuffle {
    T value;
    uint32_t operand;
    T result;
};

template <typename T>
T shuffle(const char* instruction, T value, uint32_t operand, void (*compute)(Shuffle<T>* const*)) {
    Shuffle<T> mine{value, operand, value};
    meet_warp(instruction, mine, compute);
    return mine.result;
}
template <typename T>
void from_xor(Shuffle<T>* const* lanes) {
    for (uint32_t i = 0; i < WARP_LANES; i++) {
        lanes[i]->result = lanes[(i ^ lanes[i]->operand) % WARP_LANES]->value;
    }
}
template <typename T>
void from_source(Shuffle<T>* const* lanes) {
    for (uint32_t i = 0; i < WARP_LANES; i++) lanes[i]->result = lanes[lanes[i]->operand % WARP_LANES]->value;
}
template <typename T>
void from_below(Shuffle<T>* const* lanes) {
    for (uint32_t i = 0; i < WARP_LANES; i++) {
        if (lanes[i]->operand <= i) lanes[i]->result = lanes[i - lanes[i]->operand]->value;
    }
}

struct Vote {
    bool mine;
    uint32_t all;
};
inline void count_votes(Vote* const* lanes) {
    uint32_t all = 0;
    for (uint32_t i = 0; i < WARP_LANES; i++) all |= uint32_t(lanes[i]->mine) << i;
    for (uint32_t i = 0; i < WARP_LANES; i++) lanes[i]->all = all;
}
inline void nothing(void* const*) {}

}  // namespace emulation

DEVICE void block_barrier() {
    emulation::wait_at_barrier(0, emulation::current->block->threads, "the block's barrier");
}
DEVICE void named_barrier(uint32_t id, uint32_t threads) {
    if (id == 0 || id >= emulation::BARRIERS) emulation::fault("named barrier %u: they are numbered 1 to 15", id);
    if (threads == 0 || threads % 32 != 0) emulation::fault("a named barrier of %u threads, no multiple of 32", threads);
    emulation::wait_at_barrier(id, threads, "a named barrier");
}
DEVICE void warp_barrier() { emulation::meet(emulation::current->warp, "warp_barrier", nullptr, emulation::nothing); }

DEVICE float shuffle_xor(float x, uint32_t mask) { return emulation::shuffle("shuffle_xor", x, mask, emulation::from_xor<float>); }
DEVICE uint32_t shuffle_xor(uint32_t x, uint32_t mask) { return emulation::shuffle("shuffle_xor", x, mask, emulation::from_xor<uint32_t>); }
DEVICE int32_t shuffle_xor(int32_t x, uint32_t mask) { return emulation::shuffle("shuffle_xor", x, mask, emulation::from_xor<int32_t>); }
DEVICE uint64_t shuffle_xor(uint64_t x, uint32_t mask) { return emulation::shuffle("shuffle_xor", x, mask, emulation::from_xor<uint64_t>); }
DEVICE float shuffle(float x, uint32_t source) { return emulation::shuffle("shuffle", x, source, emulation::from_source<float>); }
DEVICE uint32_t shuffle(uint32_t x, uint32_t source) { return emulation::shuffle("shuffle", x, source, emulation::from_source<uint32_t>); }
DEVICE uint64_t shuffle(uint64_t x, uint32_t source) { return emulation::shuffle("shuffle", x, source, emulation::from_source<uint64_t>); }
DEVICE uint32_t shuffle_up(uint32_t x, uint32_t delta) { return emulation::shuffle("shuffle_up", x, delta, emulation::from_below<uint32_t>); }
DEVICE uint64_t shuffle_up(uint64_t x, uint32_t delta) { return emulation::shuffle("shuffle_up", x, delta, emulation::from_below<uint64_t>); }
DEVICE uint32_t votes(bool x) {
    emulation::Vote vote{x, 0};
    emulation::meet_warp("votes", vote, emulation::count_votes);
    return vote.all;
}

DEVICE uint32_t atomic_add(uint32_t* to, uint32_t x) { return __atomic_fetch_add(to, x, __ATOMIC_RELAXED); }
DEVICE uint64_t atomic_add(uint64_t* to, uint64_t x) { return __atomic_fetch_add(to, x, __ATOMIC_RELAXED); }

namespace emulation {
// Replaces the value by `x` if it is smaller, and returns the old value.
template <typename T>
T atomic_larger(T* to, T x) {
    T old = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (old < x) {
        if (__atomic_compare_exchange_n(to, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
    }
    return old;
}
}  // namespace emulation

DEVICE uint32_t atomic_max(uint32_t* to, uint32_t x) { return emulation::atomic_larger(to, x); }
DEVICE uint64_t atomic_max(uint64_t* to, uint64_t x) { return emulation::atomic_larger(to, x); }
DEVICE void global_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// In the emulator, launches run one after another. If a launch may overlap the previous one, every block must wait, and one
// block cannot access what earlier kernels wrote until it waits.
DEVICE void grid_dependency_wait() { emulation::wait_for_dependency(); }
DEVICE void grid_dependency_launch() {}
