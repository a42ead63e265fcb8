// Fibers: stacks, and switching from one to another.
#pragma once

#include <stddef.h>

namespace emulation {

// The size of a fiber's stack. Its pages are allocated when they are first accessed; an access below the stack faults.
constexpr size_t STACK_BYTES = 256 * 1024;

class Stack {
public:
    Stack();
    ~Stack();
    Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // Prepares the stack so that switching to it calls `entry`, which must not return.
    void* prepare(void (*entry)());

private:
    unsigned char* memory_;
};

// Saves the running fiber's state and continues with `to`, a value that an earlier switch saved or that `prepare` returned.
void switch_fiber(void** save, void* to);

}  // namespace emulation
