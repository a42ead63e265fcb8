// Handles the signals of faulting kernels, and implements the functions that compiled-in checks call.
#include "traps.h"

#include <signal.h>
#include <stdint.h>
#include <stdlib.h>

#include "machine.h"
#include "regions.h"

namespace emulation {

__thread sigjmp_buf* trap_landing = nullptr;
__thread int trapped_signal = 0;
__thread void* trapped_address = nullptr;

namespace {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
constexpr size_t SIGNAL_STACK_BYTES = 64 * 1024;

struct sigaction previous[64];

void on_signal(int signal, siginfo_t* what, void*) {
    if (trap_landing == nullptr) {
        // Not caused by a kernel: the instruction runs again, and the previous handler gets its signal.
        sigaction(signal, &previous[signal], nullptr);
        return;
    }
    if (signal == SIGSEGV && allow_first_write(what->si_addr)) return;
    trapped_signal = signal;
    trapped_address = what->si_addr;
    siglongjmp(*trap_landing, 1);
}

bool install() {
    for (int signal : SIGNALS) {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(signal, &action, &previous[signal]);
    }
    return true;
}

// A separate stack for signals, since the kernel's own stack may have overflowed. Rust's threads already have one.
struct SignalStack {
    SignalStack() {
        stack_t present = {};
        sigaltstack(nullptr, &present);
        if ((present.ss_flags & SS_DISABLE) == 0) return;
        memory = malloc(SIGNAL_STACK_BYTES);
        stack_t stack = {};
        stack.ss_sp = memory;
        stack.ss_size = SIGNAL_STACK_BYTES;
        sigaltstack(&stack, nullptr);
    }
    ~SignalStack() {
        if (memory == nullptr) return;
        stack_t none = {};
        none.ss_flags = SS_DISABLE;
        sigaltstack(&none, nullptr);
        free(memory);
    }
    void* memory = nullptr;
};

}  // namespace

void catch_traps() {
    static const bool installed = install();
    static thread_local SignalStack stack;
    (void)installed;
    (void)&stack;
}

}  // namespace emulation

// Kernels are compiled with checks of indices, alignment and shifts (kernels/build/emulator.rs). These are the functions that
// the compiler calls when a check fails. The data that it passes starts with the place in the source.
extern "C" {

struct SourcePlace {
    const char* file;
    uint32_t line, column;
};

#define KERNEL_CHECK(name, operands, ...)                                                              \
    [[noreturn]] void __ubsan_handle_##name##_abort operands {                                         \
        emulation::fault_at(place->file, place->line, __VA_ARGS__);                                    \
    }

KERNEL_CHECK(out_of_bounds, (const SourcePlace* place, uintptr_t index), "index %lld is beyond the array", (long long)(index))
KERNEL_CHECK(type_mismatch_v1, (const SourcePlace* place, uintptr_t address), "address %#llx is not aligned for this access", (unsigned long long)(address))
KERNEL_CHECK(shift_out_of_bounds, (const SourcePlace* place, uintptr_t, uintptr_t by), "a shift by %lld", (long long)(by))
KERNEL_CHECK(divrem_overflow, (const SourcePlace* place, uintptr_t, uintptr_t), "%s", "a division by zero")
KERNEL_CHECK(float_cast_overflow, (const SourcePlace* place, uintptr_t), "%s", "a float that no such integer can hold")
}
