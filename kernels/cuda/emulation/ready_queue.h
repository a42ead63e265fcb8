// The queue that decides which of the threads that can run is next.
#pragma once

#include <stdint.h>

#include <utility>

#include "machine.h"

namespace emulation {

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        state_ += 0x9e3779b97f4a7c15ull;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t bound) { return uint32_t(next() % bound); }

private:
    uint64_t state_;
};

// The threads that can run. Each is in the queue at most once.
class ReadyQueue {
public:
    void clear() { head_ = count_ = 0; }
    bool empty() const { return count_ == 0; }
    void push(Thread* thread) { at(count_++) = thread; }
    Thread* pop(Order order, Random& random) {
        if (order == Order::Shuffled) std::swap(at(0), at(random.below(count_)));
        count_--;
        if (order == Order::Backward) return at(count_);
        Thread* first = threads_[head_];
        head_ = (head_ + 1) % MAX_BLOCK_THREADS;
        return first;
    }

private:
    Thread*& at(uint32_t i) { return threads_[(head_ + i) % MAX_BLOCK_THREADS]; }

    Thread* threads_[MAX_BLOCK_THREADS];
    uint32_t head_ = 0, count_ = 0;
};

}  // namespace emulation
