// The machine that runs kernels on the host: each thread of the operating system runs one block at a time, with the block's
// threads as fibers. A fiber runs until it must wait for other threads (in a shuffle, a barrier, a matrix instruction). The
// launch chooses the order in which they run, so that a missing barrier causes a wrong result in one order or another.
//
// It does not know what the instructions compute: that is in the other headers of this folder.
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
// The byte with which memory is filled before it is written: NaN as float, bf16, f16 and fp8.
constexpr unsigned char POISON = 0xff;

struct Index {
    uint32_t x, y, z;
};

// The order in which blocks run, and in which threads run between the points where they wait for each other.
enum class Order : uint32_t {
    // In turn, the lowest first.
    Forward,
    // The highest first, as far as it can run.
    Backward,
    // A random order from the launch's seed.
    Shuffled,
};

// Whether kernels have written an allocation since the host last waited for all of them.
enum class RegionState : uint32_t {
    // Not written yet. Its pages are read-only, so that the first write is detected.
    Unwritten,
    Written,
    // Written, and inaccessible until the kernel waits for the previous ones.
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
    // Not 0 if the launch may overlap the previous one, so that every block must wait for that one's end.
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

// Registers a kernel by its name when the program starts.
struct Registration {
    explicit Registration(const Kernel& kernel);
};

// A pending copy of 16 bytes to shared memory, or of zeros if `from` is null.
struct AsyncCopy {
    void* to;
    const void* from;
};

struct Block;
struct Thread;

// Threads that execute an instruction together. Each arrives with its operands; the last one to arrive computes for all.
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
    // Each thread's sums.
    float* c[WARPGROUP_LANES];
    // The sums before the product, while the threads' own are poison. Empty if an earlier pending product holds them.
    std::vector<float> sums;
};

struct Warpgroup : Party {
    bool fenced = false;
    std::vector<PendingProduct> products;
    // The ends of committed groups in `products`.
    std::vector<size_t> groups;
};

struct Thread {
    void* stack_pointer = nullptr;
    Index index = {};
    uint32_t number = 0;
    uint32_t lane = 0;
    Block* block = nullptr;
    Party* warp = nullptr;
    // Null for threads of an incomplete warpgroup.
    Warpgroup* warpgroup = nullptr;
    // What the thread waits for, if it waits.
    const char* waits_for = nullptr;
    bool done = false;
    // The pending copies in order of issue; `copy_groups` holds the ends of committed groups.
    std::vector<AsyncCopy> copies;
    std::vector<size_t> copy_groups;
};

// Threads of a block that wait for each other.
struct Barrier {
    uint32_t expected = 0;
    std::vector<Thread*> waiting;
};

// A pending copy of a box of a matrix to shared memory.
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
    // Whether the block has not waited for the previous kernel yet, which may therefore still run.
    bool before_dependency = false;
    std::vector<SharedVariable> shared_variables;
    Barrier barriers[BARRIERS];
    std::map<const void*, TransactionBarrier> transaction_barriers;
};

// The running thread.
extern __thread Thread* current;

// Ends the launch with an error that names the kernel, the block and the running thread.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// As fault, with the place in the kernel's source.
[[noreturn]] void fault_at(const char* file, uint32_t line, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Lets other threads run until one wakes this thread.
void wait_for(const char* what);
void wake(Thread* thread);

// Executes an instruction together with the other threads of the party. Once all have arrived, `compute` gets the operands of
// all, by their number in the party.
void meet(Party* party, const char* instruction, void* operands, void (*compute)(void* const* operands));

// Waits at one of the block's barriers until `expected` threads have arrived.
void wait_at_barrier(uint32_t id, uint32_t expected, const char* what);

// Waits for the previous kernel. From here on, the block may access what earlier kernels write.
void wait_for_dependency();

// Poisons a static shared variable when the first thread of a block reaches its declaration.
void declare_shared(void* address, size_t bytes);

template <typename Operands>
void meet_warp(const char* instruction, Operands& operands, void (*compute)(Operands* const*)) {
    meet(current->warp, instruction, &operands, reinterpret_cast<void (*)(void* const*)>(compute));
}

}  // namespace emulation
