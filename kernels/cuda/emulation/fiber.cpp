// On x86-64, a switch saves the callee-saved registers and changes the stack pointer, which takes a few nanoseconds. On other
// processors it uses the C library's contexts, which are slower.
#include "fiber.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {

constexpr size_t GUARD_BYTES = 64 * 1024;

Stack::Stack() {
    void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    mprotect(memory_, GUARD_BYTES, PROT_NONE);
}

Stack::~Stack() {
    if (memory_ != nullptr) munmap(memory_, GUARD_BYTES + STACK_BYTES);
}

#ifdef __x86_64__

asm(R"(
    .text
    .p2align 4
    .type outrigger_switch_fiber, @function
outrigger_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size outrigger_switch_fiber, . - outrigger_switch_fiber
)");
extern "C" void outrigger_switch_fiber(void** save, void* to) __attribute__((visibility("hidden")));

void* Stack::prepare(void (*entry)()) {
    // Six registers, the entry's address, and above them a return address that is never used: at the entry the stack
    // pointer must be 8 below a multiple of 16, as after a call.
    uint64_t* top = reinterpret_cast<uint64_t*>(memory_ + GUARD_BYTES + STACK_BYTES);
    uint64_t* frame = top - 8;
    memset(frame, 0, 8 * sizeof(uint64_t));
    frame[6] = reinterpret_cast<uint64_t>(entry);
    return frame;
}

void switch_fiber(void** save, void* to) { outrigger_switch_fiber(save, to); }

#else

void* Stack::prepare(void (*entry)()) {
    // The context itself is stored at the low end, below the stack.
    ucontext_t* context = new (memory_ + GUARD_BYTES) ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = memory_ + GUARD_BYTES + sizeof(ucontext_t);
    context->uc_stack.ss_size = STACK_BYTES - sizeof(ucontext_t);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

void switch_fiber(void** save, void* to) {
    ucontext_t own;
    *save = &own;
    swapcontext(&own, static_cast<ucontext_t*>(to));
}

#endif

}  // namespace emulation
