// Implements transaction barriers, bulk copies and products of a warpgroup.
#include <algorithm>

#include "../prelude.cuh"

namespace emulation {
namespace {

constexpr uint32_t TILE_ROW_BYTES = 128;
constexpr uint32_t TILE_ALIGNMENT = 1024;
constexpr uint32_t WINDOW_START = 1024;
constexpr uint64_t TENSOR_MAP_MARK = 0x74656e736f726d61;

// A tensor map as kernels/src/gpu/emulator/queue.rs encodes it.
struct EncodedMap {
    uint64_t mark, address, rows, cols, row_stride_bytes;
    uint32_t element_bytes, box_rows, box_cols;
};

TransactionBarrier& barrier_at(uint64_t* address) {
    auto& all = current->block->transaction_barriers;
    auto found = all.find(address);
    if (found == all.end()) fault("uses a transaction barrier at %p that nobody has initialized", static_cast<void*>(address));
    return found->second;
}

// Converts an offset to a swizzled tile's, or back: 16-byte chunk c of row r is stored at chunk c ^ (r % 8), by address.
size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Reads a line of a box: the bytes of the map's row `row` from `col` on, and zeros beyond its end.
void read_line(const EncodedMap& map, uint64_t row, uint64_t col, unsigned char* line) {
    memset(line, 0, TILE_ROW_BYTES);
    if (row >= map.rows || col >= map.cols) return;
    uint64_t elements = std::min<uint64_t>(map.box_cols, map.cols - col);
    const unsigned char* from = reinterpret_cast<const unsigned char*>(map.address) + row * map.row_stride_bytes + col * map.element_bytes;
    memcpy(line, from, elements * map.element_bytes);
}

void perform(const BulkCopy& copy, TransactionBarrier& barrier) {
    EncodedMap map;
    memcpy(&map, copy.map, sizeof map);
    for (uint32_t row = 0; row < map.box_rows; row++) {
        unsigned char line[TILE_ROW_BYTES];
        read_line(map, uint64_t(copy.row) + row, copy.col, line);
        for (uint32_t at = 0; at < TILE_ROW_BYTES; at += 16) memcpy(copy.to + swizzled(row * TILE_ROW_BYTES + at), line + at, 16);
    }
    barrier.bytes_left -= int64_t(map.box_rows) * TILE_ROW_BYTES;
}

void perform_all(TransactionBarrier& barrier) {
    for (const BulkCopy& copy : barrier.copies) perform(copy, barrier);
    barrier.copies.clear();
}

void end_phase_if_complete(TransactionBarrier& barrier) {
    if (barrier.arrivals_left > 0 || !barrier.copies.empty()) return;
    if (barrier.bytes_left < 0) fault("bulk copies bring a barrier %lld bytes more than it expects", static_cast<long long>(-barrier.bytes_left));
    if (barrier.bytes_left > 0) return;
    barrier.phase++;
    barrier.arrivals_left = barrier.count;
    for (Thread* thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
}

const unsigned char* tile_of(uint64_t operand, uint32_t rows) {
    uint64_t stride = operand >> 32 & 0x3fff, swizzle = operand >> 62, base_offset = operand >> 49 & 7;
    if (stride != 1024 >> 4 || swizzle != 1 || base_offset != 0) {
        fault("a product's operand %#llx is not a tile of 128-byte rows, swizzled", static_cast<unsigned long long>(operand));
    }
    uint32_t start = uint32_t(operand & 0x3fff) << 4;
    uint32_t tile = start / TILE_ALIGNMENT * TILE_ALIGNMENT;
    if (start < WINDOW_START || start - tile > TILE_ROW_BYTES - 32 || tile + rows * TILE_ROW_BYTES > WINDOW_START + current->block->launch->shared_bytes) {
        fault("a product's operand at %u with %u rows is not within a tile of shared memory", start, rows);
    }
    return current->block->dynamic_shared + (start - WINDOW_START);
}

// Element k of the row, where `start` points at k = 0 of the tile's first row.
template <typename E>
double tile_element(const unsigned char* start, uint32_t row, uint32_t k) {
    size_t base = reinterpret_cast<uintptr_t>(start) % TILE_ALIGNMENT;
    E value;
    memcpy(&value, start - base + swizzled(base + row * TILE_ROW_BYTES + k * sizeof(E)), sizeof value);
    return widen(value);
}

// c[64, n] += a[64, k] · b[n, k]^T for 32 bytes of k; `c` are the threads' sums.
template <typename E>
void multiply(float* const* c, uint32_t n, const unsigned char* a, const unsigned char* b) {
    constexpr uint32_t K = 32 / sizeof(E), M = 64, MAX_N = 256;
    static thread_local double columns[K][MAX_N];
    for (uint32_t col = 0; col < n; col++) {
        for (uint32_t k = 0; k < K; k++) columns[k][col] = tile_element<E>(b, col, k);
    }
    for (uint32_t row = 0; row < M; row++) {
        double sums[MAX_N] = {};
        for (uint32_t k = 0; k < K; k++) {
            double x = tile_element<E>(a, row, k);
            for (uint32_t col = 0; col < n; col++) sums[col] += x * columns[k][col];
        }
        for (uint32_t col = 0; col < n; col++) {
            uint32_t thread = row / 16 * 32 + row % 8 * 4 + col % 8 / 2;
            float& sum = c[thread][col / 8 * 4 + row % 16 / 8 * 2 + col % 2];
            sum = float(double(sum) + sums[col]);
        }
    }
}

// Takes the sums from the threads, whose registers are poison until the product is done.
void take_sums(PendingProduct& product) {
    uint32_t count = product.n / 2;
    product.sums.resize(size_t(count) * WARPGROUP_LANES);
    for (uint32_t i = 0; i < WARPGROUP_LANES; i++) {
        memcpy(&product.sums[size_t(i) * count], product.c[i], count * sizeof(float));
        memset(product.c[i], POISON, count * sizeof(float));
    }
}

void return_sums(PendingProduct& product) {
    uint32_t count = product.n / 2;
    for (uint32_t i = 0; i < WARPGROUP_LANES; i++) memcpy(product.c[i], &product.sums[size_t(i) * count], count * sizeof(float));
    product.sums.clear();
}

struct Issue {
    float* c;
    uint32_t n;
    uint64_t a, b;
    Multiply multiply;
};

void issue(void* const* operands) {
    Warpgroup& warpgroup = *current->warpgroup;
    if (!warpgroup.fenced) fault("a product without wgmma_fence before it");
    const Issue& first = *static_cast<const Issue*>(operands[0]);
    PendingProduct product{first.multiply, first.n, tile_of(first.a, 64), tile_of(first.b, first.n), {}, {}};
    for (uint32_t i = 0; i < WARPGROUP_LANES; i++) {
        const Issue& mine = *static_cast<const Issue*>(operands[i]);
        if (mine.a != first.a || mine.b != first.b || mine.n != first.n) fault("the threads of a warpgroup name different tiles");
        product.c[i] = mine.c;
    }
    auto same_sums = [&](const PendingProduct& other) { return other.c[0] == product.c[0]; };
    bool held = std::any_of(warpgroup.products.begin(), warpgroup.products.end(), same_sums);
    if (!held) take_sums(product);
    warpgroup.products.push_back(std::move(product));
}

void fence(void* const*) { current->warpgroup->fenced = true; }

void commit(void* const*) { current->warpgroup->groups.push_back(current->warpgroup->products.size()); }

void finish(void* const* operands) {
    Warpgroup& warpgroup = *current->warpgroup;
    size_t pending = *static_cast<const size_t*>(operands[0]);
    if (pending == 0) warpgroup.fenced = false;
    if (warpgroup.groups.size() <= pending) return;
    size_t groups = warpgroup.groups.size() - pending;
    size_t end = warpgroup.groups[groups - 1];
    auto& products = warpgroup.products;
    for (size_t i = 0; i < end; i++) {
        if (!products[i].sums.empty()) return_sums(products[i]);
        products[i].multiply(products[i].c, products[i].n, products[i].a, products[i].b);
    }
    for (size_t i = end; i < products.size(); i++) {
        auto same_sums = [&](const PendingProduct& other) { return other.c[0] == products[i].c[0]; };
        auto first = std::find_if(products.begin() + ptrdiff_t(end), products.end(), same_sums);
        if (&*first == &products[i] && products[i].sums.empty()) take_sums(products[i]);
    }
    products.erase(products.begin(), products.begin() + ptrdiff_t(end));
    warpgroup.groups.erase(warpgroup.groups.begin(), warpgroup.groups.begin() + ptrdiff_t(groups));
    for (size_t& group : warpgroup.groups) group -= end;
}

}  // namespace

void init_transaction_barrier(uint64_t* address, uint32_t arrivals) {
    check_alignment(address, 8, "mbarrier_init");
    if (arrivals == 0 || arrivals >= 1 << 20) fault("a transaction barrier of %u arrivals", arrivals);
    auto [place, fresh] = current->block->transaction_barriers.try_emplace(address);
    if (!fresh && !place->second.waiting.empty()) fault("initializes a transaction barrier that others wait at");
    place->second = TransactionBarrier{};
    place->second.count = place->second.arrivals_left = arrivals;
}

void arrive(uint64_t* address, uint32_t bytes) {
    TransactionBarrier& barrier = barrier_at(address);
    if (barrier.arrivals_left == 0) fault("arrives at a transaction barrier whose %u arrivals of this phase have come", barrier.count);
    barrier.bytes_left += bytes;
    barrier.arrivals_left--;
    if (!barrier.waiting.empty()) perform_all(barrier);
    end_phase_if_complete(barrier);
}

void wait_for_phase(uint64_t* address, uint32_t parity) {
    if (parity > 1) fault("waits for parity %u", parity);
    TransactionBarrier& barrier = barrier_at(address);
    if (barrier.phase % 2 != parity) return;
    perform_all(barrier);
    end_phase_if_complete(barrier);
    if (barrier.phase % 2 != parity) return;
    barrier.waiting.push_back(current);
    wait_for("a transaction barrier");
}

void copy_box(void* tile, const void* map, uint32_t row, uint32_t col, uint64_t* address) {
    TransactionBarrier& barrier = barrier_at(address);
    const Block& block = *current->block;
    const unsigned char* params = static_cast<const unsigned char*>(block.launch->params);
    const unsigned char* place = static_cast<const unsigned char*>(map);
    if (place < params || place + sizeof(TensorMap) > params + block.kernel->params_bytes) {
        fault("a tensor map that is not part of the kernel's argument");
    }
    EncodedMap encoded;
    memcpy(&encoded, map, sizeof encoded);
    if (encoded.mark != TENSOR_MAP_MARK) fault("a tensor map that the driver did not encode");
    check_alignment(tile, TILE_ALIGNMENT, "tensor_copy to");
    size_t bytes = size_t(encoded.box_rows) * TILE_ROW_BYTES;
    size_t offset = shared_window_address(tile) - WINDOW_START;
    if (offset + bytes > block.launch->shared_bytes) fault("a tile of %zu bytes at %zu is beyond the %u bytes of shared memory", bytes, offset, block.launch->shared_bytes);
    memset(tile, POISON, bytes);
    barrier.copies.push_back({static_cast<unsigned char*>(tile), map, row, col});
    if (!barrier.waiting.empty()) perform_all(barrier);
    end_phase_if_complete(barrier);
}

Multiply multiply_tiles(bf16) { return multiply<bf16>; }
Multiply multiply_tiles(f16) { return multiply<f16>; }
Multiply multiply_tiles(fp8) { return multiply<fp8>; }

void issue_product(float* c, uint32_t n, uint64_t a, uint64_t b, Multiply multiply) {
    Issue mine{c, n, a, b, multiply};
    meet(current->warpgroup, "wgmma", &mine, issue);
}

void fence_products() { meet(current->warpgroup, "wgmma_fence", nullptr, fence); }

void commit_products() { meet(current->warpgroup, "wgmma_commit", nullptr, commit); }

void finish_products(size_t pending) { meet(current->warpgroup, "wgmma_wait", &pending, finish); }

}  // namespace emulation
