// Schedules a block's threads, and implements the interface to Rust (kernels/src/gpu/emulator).
#include "machine.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <new>
#include <string>

#include "fiber.h"
#include "ready_queue.h"
#include "regions.h"
#include "traps.h"

namespace emulation {

__thread Thread* current = nullptr;

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t SHARED_REGION = (MAX_SHARED_BYTES + PAGE - 1) / PAGE * PAGE;
constexpr size_t SHARED_ALIGNMENT = 1024;

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

// Runs blocks on a thread of the operating system.
class Multiprocessor {
public:
    Multiprocessor();
    ~Multiprocessor();
    // Runs a block. Returns whether it ran to its end; otherwise `error` says what went wrong.
    bool run(const Kernel& kernel, const Launch& launch, Index block, bool before_dependency);

    void wait_for(const char* what);
    void push(Thread* thread) { ready_.push(thread); }
    void end_thread();
    [[noreturn]] void fail(const char* message);

    std::string error;
    // The address outside of its memory that the block accessed, or null.
    void* touched = nullptr;
    Block block;
    unsigned char* shared_region;

private:
    void prepare(const Kernel& kernel, const Launch& launch, Index index);
    void prepare_threads();
    void describe_trap();
    std::string where(const Thread& thread) const;
    void check_end();
    void run_next();
    std::string describe_deadlock() const;

    std::vector<Stack> stacks_;
    std::vector<Thread> threads_;
    std::vector<Party> warps_;
    std::vector<Warpgroup> warpgroups_;
    ReadyQueue ready_;
    Random random_{0};
    uint32_t live_ = 0;
    void* scheduler_ = nullptr;
};

thread_local Multiprocessor* multiprocessor = nullptr;

// Frees a thread's multiprocessor when the thread ends.
struct Owner {
    ~Owner() { delete multiprocessor; }
};

Multiprocessor& own_multiprocessor() {
    static thread_local Owner owner;
    (void)&owner;
    catch_traps();
    if (multiprocessor == nullptr) multiprocessor = new Multiprocessor;
    return *multiprocessor;
}

std::string formatted(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string formatted(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

std::string name_of(Index i) { return formatted("(%u, %u, %u)", i.x, i.y, i.z); }

Multiprocessor::Multiprocessor() {
    size_t bytes = PAGE + SHARED_REGION + PAGE;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    shared_region = static_cast<unsigned char*>(memory) + PAGE;
    mprotect(memory, PAGE, PROT_NONE);
    mprotect(shared_region + SHARED_REGION, PAGE, PROT_NONE);
}

Multiprocessor::~Multiprocessor() { munmap(shared_region - PAGE, PAGE + SHARED_REGION + PAGE); }

void thread_entry() {
    current->block->kernel->body(current->block->launch->params);
    multiprocessor->end_thread();
}

void Multiprocessor::prepare(const Kernel& kernel, const Launch& launch, Index index) {
    block.kernel = &kernel;
    block.launch = &launch;
    block.index = index;
    block.size = {launch.block[0], launch.block[1], launch.block[2]};
    block.grid = {launch.grid[0], launch.grid[1], launch.grid[2]};
    block.threads = launch.block[0] * launch.block[1] * launch.block[2];
    block.waited_for_dependency = false;
    block.shared_variables.clear();
    block.transaction_barriers.clear();
    for (Barrier& barrier : block.barriers) barrier.waiting.clear();
    // The block's memory ends where a page that faults begins, except for padding to the alignment.
    size_t room = (launch.shared_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    block.dynamic_shared = shared_region + SHARED_REGION - room;
    memset(block.dynamic_shared, POISON, room);
    uint64_t place = index.x + uint64_t(launch.grid[0]) * (index.y + uint64_t(launch.grid[1]) * index.z);
    random_ = Random(launch.seed ^ place * 0xd1342543de82ef95ull);
}

void Multiprocessor::prepare_threads() {
    while (stacks_.size() < block.threads) stacks_.emplace_back();
    if (threads_.size() < block.threads) threads_.resize(block.threads);
    warps_.assign((block.threads + WARP_LANES - 1) / WARP_LANES, Party{});
    warpgroups_.assign(block.threads / WARPGROUP_LANES, Warpgroup{});
    for (Party& party : warps_) party.size = WARP_LANES;
    for (Warpgroup& party : warpgroups_) party.size = WARPGROUP_LANES;
    ready_.clear();
    live_ = block.threads;
    for (uint32_t i = 0; i < block.threads; i++) {
        Thread& thread = threads_[i];
        thread.stack_pointer = stacks_[i].prepare(thread_entry);
        thread.index = {i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y};
        thread.number = i;
        thread.lane = i % WARP_LANES;
        thread.block = &block;
        thread.warp = &warps_[i / WARP_LANES];
        thread.warpgroup = i / WARPGROUP_LANES < warpgroups_.size() ? &warpgroups_[i / WARPGROUP_LANES] : nullptr;
        thread.waits_for = nullptr;
        thread.done = false;
        thread.copies.clear();
        thread.copy_groups.clear();
        ready_.push(&thread);
    }
}

bool Multiprocessor::run(const Kernel& kernel, const Launch& launch, Index index, bool before_dependency) {
    prepare(kernel, launch, index);
    prepare_threads();
    block.before_dependency = before_dependency;
    error.clear();
    touched = nullptr;
    sigjmp_buf landing;
    if (sigsetjmp(landing, 1) == 0) {
        trap_landing = &landing;
        current = ready_.pop(launch.order, random_);
        switch_fiber(&scheduler_, current->stack_pointer);
    } else {
        describe_trap();
    }
    trap_landing = nullptr;
    current = nullptr;
    if (error.empty()) check_end();
    return error.empty();
}

void Multiprocessor::describe_trap() {
    bool memory = trapped_signal == SIGSEGV || trapped_signal == SIGBUS;
    if (memory) touched = trapped_address;
    error = where(*current) + (memory ? formatted("touches %p", trapped_address) : formatted("stopped by signal %d", trapped_signal));
}

// Checks what can be checked only when all threads have ended.
void Multiprocessor::check_end() {
    const Launch& launch = *block.launch;
    std::string where = formatted("kernel %s, block %s", block.kernel->name, name_of(block.index).c_str());
    if (launch.overlap != 0 && !block.waited_for_dependency) {
        error = where + ": was launched to overlap the kernel before it, and ends without grid_dependency_wait";
    }
    for (const auto& [address, barrier] : block.transaction_barriers) {
        if (!barrier.copies.empty()) error = where + ": ends while bulk copies are under way that nobody waited for";
    }
    for (const Warpgroup& warpgroup : warpgroups_) {
        if (!warpgroup.products.empty()) error = where + ": ends while products of a warpgroup are under way";
    }
    unsigned char* end = shared_region + SHARED_REGION;
    for (unsigned char* byte = block.dynamic_shared + launch.shared_bytes; byte < end; byte++) {
        if (*byte != POISON) {
            error = where + formatted(": writes %zu bytes beyond its %u bytes of dynamic shared memory",
                                      size_t(byte - block.dynamic_shared) - launch.shared_bytes, launch.shared_bytes);
            break;
        }
    }
}

// Continues with another thread, or with the scheduler if the block has ended or no thread can run.
void Multiprocessor::run_next() {
    Thread* before = current;
    if (ready_.empty()) {
        if (live_ > 0) error = describe_deadlock();
        switch_fiber(&before->stack_pointer, scheduler_);
        abort();  // not reached: the scheduler never switches back to this fiber
    }
    current = ready_.pop(block.launch->order, random_);
    if (current != before) switch_fiber(&before->stack_pointer, current->stack_pointer);
}

void Multiprocessor::wait_for(const char* what) {
    current->waits_for = what;
    run_next();
}

void Multiprocessor::end_thread() {
    current->done = true;
    live_--;
    run_next();
}

std::string Multiprocessor::where(const Thread& thread) const {
    return formatted("kernel %s, block %s, thread %s: ", block.kernel->name, name_of(block.index).c_str(), name_of(thread.index).c_str());
}

void Multiprocessor::fail(const char* message) {
    error = where(*current) + message;
    switch_fiber(&current->stack_pointer, scheduler_);
    abort();
}

std::string Multiprocessor::describe_deadlock() const {
    std::string text = formatted("kernel %s, block %s: no thread can go on;", block.kernel->name, name_of(block.index).c_str());
    // One entry for each run of consecutive threads in the same state.
    const uint32_t MAX_STATES = 8;
    uint32_t states = 0;
    for (uint32_t i = 0; i < block.threads && states < MAX_STATES; states++) {
        const Thread& first = threads_[i];
        uint32_t last = i;
        while (last + 1 < block.threads && threads_[last + 1].done == first.done && threads_[last + 1].waits_for == first.waits_for) last++;
        text += formatted(" threads %u to %u %s%s;", i, last, first.done ? "have ended" : "wait for ", first.done ? "" : first.waits_for);
        i = last + 1;
    }
    return text;
}

}  // namespace

Registration::Registration(const Kernel& kernel) { kernels().push_back(kernel); }

void fault(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    multiprocessor->fail(text);
}

void fault_at(const char* file, uint32_t line, const char* format, ...) {
    char text[512];
    const char* name = strrchr(file, '/');
    int start = snprintf(text, sizeof text, "%s:%u: ", name == nullptr ? file : name + 1, line);
    va_list arguments;
    va_start(arguments, format);
    if (start > 0 && size_t(start) < sizeof text) vsnprintf(text + start, sizeof text - size_t(start), format, arguments);
    va_end(arguments);
    multiprocessor->fail(text);
}

void wait_for(const char* what) { multiprocessor->wait_for(what); }

void wake(Thread* thread) {
    thread->waits_for = nullptr;
    multiprocessor->push(thread);
}

void meet(Party* party, const char* instruction, void* operands, void (*compute)(void* const* operands)) {
    if (party == nullptr) fault("%s needs a whole warpgroup of 128 threads", instruction);
    uint32_t place = current->number % party->size;
    if (party->arrived > 0 && strcmp(party->instruction, instruction) != 0) {
        fault("executes %s while others of its warp execute %s", instruction, party->instruction);
    }
    party->instruction = instruction;
    party->members[place] = current;
    party->operands[place] = operands;
    party->arrived++;
    if (party->arrived < party->size) {
        wait_for(instruction);
        return;
    }
    party->arrived = 0;
    compute(party->operands);
    for (uint32_t i = 0; i < party->size; i++) {
        if (party->members[i] != current) wake(party->members[i]);
    }
}

void wait_at_barrier(uint32_t id, uint32_t expected, const char* what) {
    Barrier& barrier = current->block->barriers[id];
    if (!barrier.waiting.empty() && barrier.expected != expected) {
        fault("comes to barrier %u for %u threads while others wait there for %u", id, expected, barrier.expected);
    }
    barrier.expected = expected;
    barrier.waiting.push_back(current);
    if (barrier.waiting.size() < expected) {
        wait_for(what);
        return;
    }
    // All of them go back to the queue, including the last one to arrive, which must not always run first.
    std::vector<Thread*> together;
    together.swap(barrier.waiting);
    Thread* self = current;
    for (Thread* thread : together) wake(thread);
    together.clear();
    together.shrink_to_fit();
    self->waits_for = nullptr;
    multiprocessor->wait_for(nullptr);
}

void declare_shared(void* address, size_t bytes) {
    Block& block = *current->block;
    size_t total = bytes;
    for (const SharedVariable& variable : block.shared_variables) {
        if (variable.address == address) return;
        total += variable.bytes;
    }
    if (total > 48 * 1024) fault("%zu bytes of static shared memory; a block may have 48 KiB", total);
    if (total + block.launch->shared_bytes > MAX_SHARED_BYTES) {
        fault("%zu bytes of static and %u of dynamic shared memory; a block may have %zu", total, block.launch->shared_bytes, MAX_SHARED_BYTES);
    }
    memset(address, POISON, bytes);
    block.shared_variables.push_back({address, bytes});
}

// What the instructions in the other headers of this folder need of the block.

void finish_copies(size_t pending) {
    Thread& thread = *current;
    if (thread.copy_groups.size() <= pending) return;
    size_t groups = thread.copy_groups.size() - pending;
    size_t end = thread.copy_groups[groups - 1];
    for (size_t i = 0; i < end; i++) {
        const AsyncCopy& copy = thread.copies[i];
        if (copy.from == nullptr) {
            memset(copy.to, 0, 16);
        } else {
            memcpy(copy.to, copy.from, 16);
        }
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + ptrdiff_t(end));
    thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + ptrdiff_t(groups));
    for (size_t& group : thread.copy_groups) group -= end;
}

void wait_for_dependency() {
    Block& block = *current->block;
    block.waited_for_dependency = true;
    if (!block.before_dependency) return;
    block.before_dependency = false;
    reveal_regions(*block.launch);
}

uint32_t shared_window_address(const void* pointer) {
    const unsigned char* byte = static_cast<const unsigned char*>(pointer);
    const unsigned char* base = current->block->dynamic_shared;
    if (byte < base || byte >= base + current->block->launch->shared_bytes) {
        fault("%p is not in the block's dynamic shared memory", pointer);
    }
    // Dynamic shared memory begins at 1024, as on a device, where the first bytes are reserved for the system.
    return uint32_t(byte - base) + 1024;
}

}  // namespace emulation

using namespace emulation;

extern "C" {

// The index of the kernel with this name, or -1.
int64_t outrigger_emulator_find(const char* name, size_t* params_bytes, uint32_t* max_threads) {
    for (size_t i = 0; i < kernels().size(); i++) {
        const Kernel& kernel = kernels()[i];
        if (strcmp(kernel.name, name) != 0) continue;
        *params_bytes = kernel.params_bytes;
        *max_threads = kernel.max_threads;
        return int64_t(i);
    }
    return -1;
}

// Runs one block. With `before_dependency`, the writes of earlier kernels are hidden until a thread of the block waits for the
// previous kernel. On failure, `message` gets the reason, cut to `capacity` bytes with its final zero, and `touched` gets the
// address outside of the kernel's memory, if such an access was the reason.
bool outrigger_emulator_run(size_t kernel, const Launch* launch, const uint32_t* block, bool before_dependency, char* message,
                            size_t capacity, void** touched) {
    Multiprocessor& own = own_multiprocessor();
    *touched = nullptr;
    if (own.run(kernels()[kernel], *launch, {block[0], block[1], block[2]}, before_dependency)) return true;
    snprintf(message, capacity, "%s", own.error.c_str());
    *touched = own.touched;
    return false;
}
}
