// Matrix instructions of a whole warp. A product is summed in double precision, whose 53 bits hold the sums of such short
// products except for the last bits, and rounded to float once. Tensor cores round differently, so kernels are compared within
// bounds.
#pragma once

namespace emulation {

// A lane's fragments.
template <typename C>
struct Product {
    C* c;
    const uint32_t* a;
    const uint32_t* b;
};

void multiply_bf16(Product<float>* const* lanes);
void multiply_f16(Product<float>* const* lanes);
void multiply_fp8(Product<float>* const* lanes);
void multiply_s8(Product<int32_t>* const* lanes);

struct MatrixLoad {
    const void* row;
    uint32_t* words;
};

void load_matrices(MatrixLoad* const* lanes);
void load_matrices_transposed(MatrixLoad* const* lanes);

}  // namespace emulation

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Product<float> mine{c, a, b};
    emulation::meet_warp("mma_bf16", mine, emulation::multiply_bf16);
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Product<float> mine{c, a, b};
    emulation::meet_warp("mma_f16", mine, emulation::multiply_f16);
}
DEVICE void mma_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Product<float> mine{c, a, b};
    emulation::meet_warp("mma_fp8", mine, emulation::multiply_fp8);
}
DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Product<int32_t> mine{c, a, b};
    emulation::meet_warp("mma_s8", mine, emulation::multiply_s8);
}
DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    emulation::check_alignment(row, 16, "load_matrix_x4");
    emulation::MatrixLoad mine{row, r};
    emulation::meet_warp("load_matrix_x4", mine, emulation::load_matrices);
}
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    emulation::check_alignment(row, 16, "load_matrix_x4_transposed");
    emulation::MatrixLoad mine{row, r};
    emulation::meet_warp("load_matrix_x4_transposed", mine, emulation::load_matrices_transposed);
}
