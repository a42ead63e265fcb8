// The machine that runs kernels on the host: one block at a time on each thread of the operating system, the block's
// threads as fibers that run until they meet others (a shuffle, a barrier, a matrix instruction). In between they run in
// an order that the launch chooses, so that a missing barrier shows as a wrong result in one order or another.
//
// It knows nothing of what the instructions compute: those are in the headers beside it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <vector>

namespace emulation {

constexpr uint32_t WARP_LANES = 32;
constexpr uint32_t WARPGROUP_LANES = 128;
constexpr uint32_t MAX_BLOCK_THREADS = 1024;
constexpr uint32_t BARRIERS = 16;
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;
// What memory holds before it is written: NaN as float, bf16, f16 and fp8.
constexpr unsigned char POISON = 0xff;

struct Index {
    uint32_t x, y, z;
};

// The order in which threads run between the points where they meet, and blocks after one another.
enum class Order : uint32_t {
    // In turn, lowest first.
    Forward,
    // The highest first, and as far as it gets.
    Backward,
    // Whichever, from the launch's seed.
    Shuffled,
};

// Whether kernels have written an allocation since the host last waited for all of them.
enum class RegionState : uint32_t {
    // Not yet: its pages are read-only, and the first write to them is noticed.
    Unwritten,
    Written,
    // Written, and out of reach until the kernel waits for those before it.
    Hidden,
};

struct Region {
    uintptr_t start, end;
    RegionState state;
};

struct Launch {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    Order order;
    uint64_t seed;
    const void* params;
    // The launch may overlap the one before it, so that every block must wait for that one's end.
    uint32_t overlap;
    // The allocations, by address.
    Region* regions;
    size_t region_count;
};

struct Kernel {
    const char* name;
    void (*body)(const void* params);
    size_t params_bytes;
    uint32_t max_threads;
};

// Makes a kernel known by name when the program starts.
struct Registration {
    explicit Registration(const Kernel& kernel);
};

// 16 bytes on their way to shared memory, or zeros.
struct AsyncCopy {
    void* to;
    const void* from;
};

struct Block;
struct Thread;

// Threads that execute an instruction together. Each arrives with its operands; the last one computes for all of them.
struct Party {
    uint32_t size = 0;
    uint32_t arrived = 0;
    const char* instruction = nullptr;
    Thread* members[WARPGROUP_LANES] = {};
    void* operands[WARPGROUP_LANES] = {};
};

// Asynchronous matrix products of a warpgroup, from their issue to the wait for them (hopper.cpp).
struct PendingProduct {
    void (*multiply)(float* const* c, uint32_t n, const unsigned char* a, const unsigned char* b);
    uint32_t n;
    const unsigned char* a;
    const unsigned char* b;
    // Of each thread.
    float* c[WARPGROUP_LANES];
    // The sums before the product, while the threads' own are poison; empty when an earlier pending product has them.
    std::vector<float> sums;
};

struct Warpgroup : Party {
    bool fenced = false;
    std::vector<PendingProduct> products;
    // Ends of committed groups.
    std::vector<size_t> groups;
};

struct Thread {
    void* stack_pointer = nullptr;
    Index index = {};
    uint32_t number = 0;
    uint32_t lane = 0;
    Block* block = nullptr;
    Party* warp = nullptr;
    // None for threads of an incomplete warpgroup.
    Warpgroup* warpgroup = nullptr;
    // What a thread that does not run waits for.
    const char* waits_for = nullptr;
    bool done = false;
    // Copies issued, in order; `copy_groups` are the ends of committed groups.
    std::vector<AsyncCopy> copies;
    std::vector<size_t> copy_groups;
};

// Threads of a block that wait for one another.
struct Barrier {
    uint32_t expected = 0;
    std::vector<Thread*> waiting;
};

// A box of a matrix on its way to shared memory.
struct BulkCopy {
    unsigned char* to;
    const void* map;
    uint32_t row, col;
};

// A transaction barrier in shared memory, with the bulk copies that will complete on it.
struct TransactionBarrier {
    uint32_t count = 0;
    uint32_t arrivals_left = 0;
    int64_t bytes_left = 0;
    uint32_t phase = 0;
    std::vector<Thread*> waiting;
    std::vector<BulkCopy> copies;
};

struct SharedVariable {
    const void* address;
    size_t bytes;
};

struct Block {
    const Kernel* kernel = nullptr;
    const Launch* launch = nullptr;
    Index index = {};
    Index size = {};
    Index grid = {};
    uint32_t threads = 0;
    unsigned char* dynamic_shared = nullptr;
    bool waited_for_dependency = false;
    // The kernel before may still run, as far as this block knows.
    bool before_dependency = false;
    std::vector<SharedVariable> shared_variables;
    Barrier barriers[BARRIERS];
    std::map<const void*, TransactionBarrier> transaction_barriers;
};

// The thread that runs.
extern __thread Thread* current;

// Ends the launch with an error that names the kernel, the block and the running thread.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The same, and the place in the kernel's source.
[[noreturn]] void fault_at(const char* file, uint32_t line, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Lets others run until somebody wakes this thread.
void wait_for(const char* what);
void wake(Thread* thread);

// Executes an instruction together with the other threads of the party: `compute` gets the operands of all, by their
// number in the party, once all have arrived.
void meet(Party* party, const char* instruction, void* operands, void (*compute)(void* const* operands));

// Waits at one of the block's barriers until `expected` threads have come.
void wait_at_barrier(uint32_t id, uint32_t expected, const char* what);

// From here on the block may touch what kernels before it write.
void wait_for_dependency();

// Poisons a static shared variable when the first thread of a block comes to its declaration.
void declare_shared(void* address, size_t bytes);

template <typename Operands>
void meet_warp(const char* instruction, Operands& operands, void (*compute)(Operands* const*)) {
    meet(current->warp, instruction, &operands, reinterpret_cast<void (*)(void* const*)>(compute));
}

}  // namespace emulation
