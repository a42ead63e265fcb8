// Copies blocks of the KV cache, for sequences that diverge after a shared prefix.
#include "prelude.cuh"

constexpr uint32_t COPY_THREADS = 256;
constexpr uint32_t MAX_COPIES = 64;

struct CopyBlocksParams {
    // [layer][block][block_bytes]
    uint8_t* keys;
    uint8_t* values;
    uint64_t num_blocks;
    uint64_t block_bytes;
    // Source and destination blocks. No block is both.
    uint32_t copies[MAX_COPIES][2];
};

// Grid: [16-byte words of a block / COPY_THREADS, copies, layers].
KERNEL(copy_blocks, CopyBlocksParams, COPY_THREADS) {
    grid_dependency_wait();
    grid_dependency_launch();
    uint64_t word = uint64_t(blockIdx.x) * COPY_THREADS + threadIdx.x;
    if (word >= p.block_bytes / 16) return;
    uint64_t layer = blockIdx.z * p.num_blocks;
    uint64_t from = (layer + p.copies[blockIdx.y][0]) * p.block_bytes + word * 16;
    uint64_t to = (layer + p.copies[blockIdx.y][1]) * p.block_bytes + word * 16;
    *reinterpret_cast<Bytes16*>(p.keys + to) = *reinterpret_cast<const Bytes16*>(p.keys + from);
    *reinterpret_cast<Bytes16*>(p.values + to) = *reinterpret_cast<const Bytes16*>(p.values + from);
}
