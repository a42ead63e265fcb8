// What a kernel does that the host's processor or compiler notices: memory that is not its own, an index beyond an array,
// an address that an access of its size does not allow. It ends the block with an error instead of the program.
#pragma once

#include <setjmp.h>

namespace emulation {

// Where a thread of the operating system goes on when a kernel on it trapped. Null while it runs none.
extern __thread sigjmp_buf* trap_landing;
// The signal, and the address that was touched.
extern __thread int trapped_signal;
extern __thread void* trapped_address;

// Prepares the calling thread; signals outside of kernels go where they went before.
void catch_traps();

}  // namespace emulation
