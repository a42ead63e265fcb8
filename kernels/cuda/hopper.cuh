// The prelude's operations that only Hopper has (sm_90a): transaction barriers, bulk copies of matrix tiles, and matrix
// products of a warpgroup. Like device.cuh, thin wrappers of instructions. Sources for other devices do not use them.
//
// A tile in shared memory has rows of 128 bytes (64 elements of 16 bits or 128 of 8, consecutive k) and starts at a multiple
// of 1024 bytes. It is swizzled: 16-byte chunk c of row r is stored at chunk c ^ (r % 8). `tensor_copy` writes this layout, and
// the products read it.
#pragma once

// ---- transaction barriers: 8 bytes of shared memory. A phase ends when all arrivals have happened and all expected bytes
// have been copied. The parities of the phases are 0, 1, 0, 1, …; a waiting thread passes the parity of the phase for which
// it waits.

DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Called by the thread that has initialized barriers, before the block barrier after which other threads use them.
DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and makes the phase also wait for this many bytes.
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended. Returns at once if the barrier is in the phase after it.
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- bulk copies, issued by one thread

// Copies the box of the map's matrix that starts at (row, col) into a swizzled tile. Elements beyond the matrix's edges become
// zero. The bytes of the whole box count at the barrier. The map must be part of the kernel's argument.
DEVICE void tensor_copy(void* tile, const TensorMap& map, uint32_t row, uint32_t col, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(tile)),
        "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row)
        : "memory");
}
// As tensor_copy, for a tile that is not used again soon, so that the L2 cache may evict it first.
DEVICE void tensor_copy_streaming(void* tile, const TensorMap& map, uint32_t row, uint32_t col, uint64_t* barrier) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::
            "r"(shared_address(tile)),
        "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row), "l"(policy)
        : "memory");
}
DEVICE void tensor_map_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- products of a warpgroup: c[64, N] += a[64, k] · b[N, k]^T with both operands in shared memory and k of 32 bytes (16 or
// 32 elements). With g = lane / 4 and t = lane % 4, warp w of the warpgroup holds in c[4j .. 4j + 3] the rows 16w + g (twice)
// and 16w + g + 8 (twice) at columns 8j + 2t and 8j + 2t + 1.
//
//     wgmma_fence(c);
//     wgmma<bf16, N>(c, a, b) …            // any number of products
//     wgmma_commit();
//     wgmma_wait<0>(c);                    // now c may be read, and the tiles may be overwritten

// The descriptor of a tile as an operand. Groups of 8 rows are 1024 bytes apart; the leading offset is not used here.
DEVICE uint64_t wgmma_operand(const void* tile) {
    uint64_t start = (shared_address(tile) & 0x3ffff) >> 4, leading = 1, stride = 1024 >> 4, swizzle_128 = 1;
    return start | leading << 16 | stride << 32 | swizzle_128 << 62;
}
// The descriptor of the same tile, `bytes` of k further on, within the 128 bytes of a row.
DEVICE uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// Prevents the compiler from moving reads or writes of the sums across this point.
template <uint32_t COUNT>
DEVICE void wgmma_pin(float (&c)[COUNT]) {
    UNROLL for (uint32_t i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i])::"memory");
}
// Must be called before the first product, and again after any other use of the sums.
template <uint32_t COUNT>
DEVICE void wgmma_fence(float (&c)[COUNT]) {
    wgmma_pin(c);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Commits the products since the last commit as a group.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are in flight. The sums may be used only after wgmma_wait<0>.
template <int PENDING, uint32_t COUNT>
DEVICE void wgmma_wait(float (&c)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    wgmma_pin(c);
}

// The text of the instruction. The sums are operands 0 .. N/2 - 1, and the tiles the next two.
#define SUMS_4 "%0, %1, %2, %3"
#define SUMS_8 SUMS_4 ", %4, %5, %6, %7"
#define SUMS_16 SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_32 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64 \
    SUMS_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_128 \
    SUMS_64      \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, " \
    "%88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLOATS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define FLOATS_8(i) FLOATS_4(i), FLOATS_4(i + 4)
#define FLOATS_16(i) FLOATS_8(i), FLOATS_8(i + 8)
#define FLOATS_32(i) FLOATS_16(i), FLOATS_16(i + 16)
#define FLOATS_64(i) FLOATS_32(i), FLOATS_32(i + 32)
#define FLOATS_128(i) FLOATS_64(i), FLOATS_64(i + 64)

template <typename E, uint32_t N>
struct Wgmma;
#define WGMMA(E, N, SHAPE, COUNT, A, B, NOT_TRANSPOSED)                                                                        \
    template <>                                                                                                                \
    struct Wgmma<E, N> {                                                                                                       \
        static DEVICE void multiply(float (&c)[COUNT], uint64_t a, uint64_t b) {                                               \
            asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                        \
                         "wgmma.mma_async.sync.aligned." SHAPE " {" SUMS_##COUNT "}, %" #A ", %" #B ", add, 1, 1" NOT_TRANSPOSED \
                         ";\n}"                                                                                                \
                         : FLOATS_##COUNT(0)                                                                                   \
                         : "l"(a), "l"(b));                                                                                    \
        }                                                                                                                      \
    };
#define WGMMA_SIZE(N, COUNT, A, B)                                             \
    WGMMA(bf16, N, "m64n" #N "k16.f32.bf16.bf16", COUNT, A, B, ", 0, 0")       \
    WGMMA(f16, N, "m64n" #N "k16.f32.f16.f16", COUNT, A, B, ", 0, 0")          \
    WGMMA(fp8, N, "m64n" #N "k32.f32.e4m3.e4m3", COUNT, A, B, "")
WGMMA_SIZE(8, 4, 4, 5)
WGMMA_SIZE(16, 8, 8, 9)
WGMMA_SIZE(32, 16, 16, 17)
WGMMA_SIZE(64, 32, 32, 33)
WGMMA_SIZE(128, 64, 64, 65)
WGMMA_SIZE(256, 128, 128, 129)

template <typename E, uint32_t N>
DEVICE void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b) {
    Wgmma<E, N>::multiply(c, a, b);
}

#undef WGMMA_SIZE
#undef WGMMA
