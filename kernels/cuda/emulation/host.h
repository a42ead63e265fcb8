// The prelude's operations on the host, where kernels are emulated: the same names as in device.cuh, with the semantics of the
// PTX manual. A value that is undefined there is poison here.
#pragma once

#include "machine.h"

// Each source is compiled in an unnamed namespace (kernels/build/emulator.rs), so these definitions are local to it.
#define DEVICE inline
#define KERNEL(name, Params, MAX_THREADS)                                                            \
    void name(const Params& p);                                                                      \
    void name##_on_host(const void* params) { name(*static_cast<const Params*>(params)); }           \
    const ::emulation::Registration name##_registration(                                             \
        ::emulation::Kernel{#name, name##_on_host, sizeof(Params), MAX_THREADS});                    \
    void name([[maybe_unused]] const Params& p)
#define KERNEL_OCCUPANCY(name, Params, MAX_THREADS, BLOCKS) KERNEL(name, Params, MAX_THREADS)
#define SHARED(type, name, dims)                 \
    alignas(16) static thread_local type name dims; \
    ::emulation::declare_shared(&name, sizeof(name))
#define DYNAMIC_SHARED(name) unsigned char* name = ::emulation::current->block->dynamic_shared

#define UNROLL
#define NO_UNROLL
#define HAS_FP8_PRODUCTS 1

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::current->block->index)
#define blockDim (::emulation::current->block->size)
#define gridDim (::emulation::current->block->grid)

DEVICE uint32_t lane() { return ::emulation::current->lane; }
DEVICE uint32_t warp() { return threadIdx.x / 32; }

#include "numbers.h"
#include "threads.h"
#include "memory.h"
#include "matrix.h"
#include "hopper.h"
