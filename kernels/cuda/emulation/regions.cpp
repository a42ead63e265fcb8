// Makes allocations writable at their first write, and hidden ones accessible to a kernel that has waited.
#include "regions.h"

#include <sys/mman.h>

namespace emulation {
namespace {

RegionState state_of(const Region& region) { return __atomic_load_n(&region.state, __ATOMIC_ACQUIRE); }

void open_region(Region& region) {
    mprotect(reinterpret_cast<void*>(region.start), region.end - region.start, PROT_READ | PROT_WRITE);
    __atomic_store_n(&region.state, RegionState::Written, __ATOMIC_RELEASE);
}

Region* region_at(const Launch& launch, uintptr_t address) {
    size_t low = 0, high = launch.region_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        Region& region = launch.regions[middle];
        if (address < region.start) {
            high = middle;
        } else if (address >= region.end) {
            low = middle + 1;
        } else {
            return &region;
        }
    }
    return nullptr;
}

}  // namespace

bool allow_first_write(const void* address) {
    if (current == nullptr) return false;
    const Block& block = *current->block;
    Region* region = region_at(*block.launch, reinterpret_cast<uintptr_t>(address));
    if (region == nullptr) return false;
    // Another thread of the operating system may have opened it since the fault.
    if (state_of(*region) == RegionState::Written) return true;
    if (state_of(*region) == RegionState::Hidden || block.before_dependency) return false;
    open_region(*region);
    return true;
}

void reveal_regions(const Launch& launch) {
    for (size_t i = 0; i < launch.region_count; i++) {
        if (state_of(launch.regions[i]) == RegionState::Hidden) open_region(launch.regions[i]);
    }
}

}  // namespace emulation
