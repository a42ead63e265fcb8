// Stacks, and the switch from one to another.
#pragma once

#include <stddef.h>

namespace emulation {

// Pages of a fiber's stack are taken only as they are touched; one below it faults.
constexpr size_t STACK_BYTES = 256 * 1024;

class Stack {
public:
    Stack();
    ~Stack();
    Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // Makes the stack such that switching to it calls `entry`, which must not return.
    void* prepare(void (*entry)());

private:
    unsigned char* memory_;
};

// Saves the running fiber's state and goes on with `to`, a value that an earlier switch saved or `prepare` returned.
void switch_fiber(void** save, void* to);

}  // namespace emulation
