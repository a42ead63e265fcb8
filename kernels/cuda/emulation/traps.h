// Mistakes of a kernel that the host's processor or compiler detects: an access to other memory, an index beyond an array, a
// misaligned address. They end the block with an error instead of ending the program.
#pragma once

#include <setjmp.h>

namespace emulation {

// Where a thread of the operating system continues after a kernel on it has trapped. Null while it runs no kernel.
extern __thread sigjmp_buf* trap_landing;
// The signal, and the address that was accessed.
extern __thread int trapped_signal;
extern __thread void* trapped_address;

// Prepares the calling thread. Signals outside of kernels go to the previous handlers.
void catch_traps();

}  // namespace emulation
