// Memory: streaming loads, and copies to shared memory in the background. Such a copy is performed only when its thread waits
// for it; until then its destination is poison. So a missing wait, or a destination that is still being read, causes a wrong
// result.
#pragma once

struct alignas(16) Bytes16 {
    uint32_t x, y, z, w;
};

namespace emulation {

inline void check_alignment(const void* pointer, size_t bytes, const char* instruction) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
        fault("%s at %p, which is not a multiple of %zu bytes", instruction, pointer, bytes);
    }
}

// Performs all of the thread's committed copies, except for those of its last `pending` groups.
void finish_copies(size_t pending);

// The address within the block's shared memory, as matrix descriptors use it. For dynamic shared memory only.
uint32_t shared_window_address(const void* pointer);

}  // namespace emulation

DEVICE Bytes16 load_streaming(const void* from) {
    emulation::check_alignment(from, 16, "load_streaming");
    return *static_cast<const Bytes16*>(from);
}
DEVICE uint32_t shared_address(const void* pointer) { return emulation::shared_window_address(pointer); }

DEVICE void async_copy_16(void* to, const void* from, bool valid) {
    emulation::check_alignment(to, 16, "async_copy_16 to");
    emulation::check_alignment(from, 16, "async_copy_16 from");
    memset(to, emulation::POISON, 16);
    emulation::current->copies.push_back({to, valid ? from : nullptr});
}
DEVICE void async_copy_commit() { emulation::current->copy_groups.push_back(emulation::current->copies.size()); }
template <int PENDING>
DEVICE void async_copy_wait() {
    emulation::finish_copies(PENDING);
}
