// Detects which allocations kernels write, by protecting their pages. This costs one signal for each allocation.
#pragma once

#include "machine.h"

namespace emulation {

// Whether a fault at this address was the first write to an allocation. If so, the write can now be repeated.
bool allow_first_write(const void* address);

// Makes accessible again the allocations that kernels/src/gpu/emulator/memory.rs has hidden because kernels wrote them.
void reveal_regions(const Launch& launch);

}  // namespace emulation
