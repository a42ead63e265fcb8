// Kernels that test the emulator itself: one for each thing it promises to do, or to notice.
#include "prelude.cuh"

struct EmulationScaleParams {
    float* out;
    const float* in;
    float factor;
    uint32_t len;
};
KERNEL(emulation_scale, EmulationScaleParams, 256) {
    grid_dependency_wait();
    uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i < p.len) p.out[i] = p.in[i] * p.factor;
}
