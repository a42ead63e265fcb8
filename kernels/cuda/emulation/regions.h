// Allocations that kernels write: noticed by the protection of their pages, at the price of a signal for each allocation.
#pragma once

#include "machine.h"

namespace emulation {

// Whether a fault at this address was the first write to an allocation, which may now go on.
bool allow_first_write(const void* address);

// Ends what kernels/src/gpu/emulator/memory.rs began with hiding the allocations that kernels wrote.
void reveal_regions(const Launch& launch);

}  // namespace emulation
