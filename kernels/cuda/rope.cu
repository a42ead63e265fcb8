// Applies rotary position embedding (arXiv 2104.09864) to new tokens and writes their keys and values into the cache.
#include "elements.cuh"

constexpr uint32_t ROPE_WARPS = 8;
// Steps in which a lane processes its pairs of dimensions, two adjacent pairs per step: heads have at most 256 dimensions.
constexpr uint32_t LANE_STEPS = 2;

struct RopeAppendParams {
    const void* qkv;            // [rows, (heads + 2 kv_heads) head_dim]
    const float* query_weight;  // [head_dim]: norm of each query head before rotation; null for none
    const float* key_weight;
    const float* cos;  // [positions, head_dim / 2]
    const float* sin;
    const uint32_t* positions;  // [rows]
    const uint32_t* slots;      // [rows]: block · block_size + position in the block; a row beyond the cache writes nothing
    uint8_t* queries;           // [rows, heads, head_dim] of T
    uint8_t* keys;              // of this layer: [block][kv_head][position in block][head_dim] of E
    uint8_t* values;
    uint32_t num_heads, num_kv_heads, head_dim, block_size;
    uint32_t num_positions, num_slots;
    // The element type of qkv: 0 f32, 1 f16, 2 bf16.
    uint32_t element;
    float epsilon;
};

// Loads elements `at` and `at + 1` of the projections. `at` is even.
DEVICE void load_two(const RopeAppendParams& p, uint64_t at, float (&x)[2]) {
    if (p.element == 0) {
        const float* from = static_cast<const float*>(p.qkv) + at;
        x[0] = from[0], x[1] = from[1];
    } else {
        uint32_t word = reinterpret_cast<const uint32_t*>(p.qkv)[at / 2];
        if (p.element == 1) {
            widen_pair(word, x[0], x[1], f16{});
        } else {
            widen_pair(word, x[0], x[1], bf16{});
        }
    }
}

template <typename T>
DEVICE void store_two(uint8_t* row, uint32_t column, float low, float high) {
    *reinterpret_cast<uint32_t*>(row + column * sizeof(T)) = narrow_pair(low, high, T{});
}
template <>
DEVICE void store_two<fp8>(uint8_t* row, uint32_t column, float low, float high) {
    *reinterpret_cast<uint16_t*>(row + column) = uint16_t(to_fp8(low).bits | to_fp8(high).bits << 8);
}

// One warp normalizes a head (if there are weights) and rotates it. A position beyond the table gives NaN.
template <typename To>
DEVICE void rotate_head(const RopeAppendParams& p, uint64_t from, uint32_t position, const float* weight, uint8_t* to) {
    uint32_t half = p.head_dim / 2;
    float x[LANE_STEPS][2][2], squares = 0.0f;
    UNROLL
    for (uint32_t i = 0; i < LANE_STEPS; i++) {
        uint32_t pair = (i * WARP + lane()) * 2;
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            x[i][side][0] = x[i][side][1] = 0.0f;
            if (pair < half) load_two(p, from + side * half + pair, x[i][side]);
            UNROLL
            for (uint32_t e = 0; e < 2; e++) squares = fma_(x[i][side][e], x[i][side][e], squares);
        }
    }
    if (weight != nullptr) {
        float inverse = divide(1.0f, sqrt_(divide(warp_sum(squares), float(p.head_dim)) + p.epsilon));
        UNROLL
        for (uint32_t i = 0; i < LANE_STEPS * 4; i++) {
            uint32_t dim = (i / 4 * WARP + lane()) * 2 + i % 2;
            float& value = x[i / 4][i / 2 % 2][i % 2];
            if (dim < half) value = value * inverse * weight[i / 2 % 2 * half + dim];
        }
    }
    UNROLL
    for (uint32_t i = 0; i < LANE_STEPS; i++) {
        uint32_t pair = (i * WARP + lane()) * 2;
        if (pair >= half) continue;
        float rotated[2][2];
        UNROLL
        for (uint32_t e = 0; e < 2; e++) {
            bool known = position < p.num_positions;
            uint64_t at = uint64_t(position) * half + pair + e;
            float c = known ? p.cos[at] : uint_as_float(0x7fffffff), s = known ? p.sin[at] : uint_as_float(0x7fffffff);
            rotated[0][e] = x[i][0][e] * c - x[i][1][e] * s;
            rotated[1][e] = x[i][1][e] * c + x[i][0][e] * s;
        }
        store_two<To>(to, pair, rotated[0][0], rotated[0][1]);
        store_two<To>(to, half + pair, rotated[1][0], rotated[1][1]);
    }
}

template <typename To>
DEVICE void copy_head(const RopeAppendParams& p, uint64_t from, uint8_t* to) {
    for (uint32_t column = lane() * 2; column < p.head_dim; column += WARP * 2) {
        float x[2];
        load_two(p, from + column, x);
        store_two<To>(to, column, x[0], x[1]);
    }
}

// Each warp processes one head of a row: query heads first, then key heads, then value heads.
template <typename T, typename E>
DEVICE void append_row(const RopeAppendParams& p) {
    uint32_t heads = p.num_heads + 2 * p.num_kv_heads, head = blockIdx.y * ROPE_WARPS + warp(), row = blockIdx.x;
    uint32_t slot = p.slots[row];
    if (head >= heads || slot >= p.num_slots) return;
    uint64_t from = (uint64_t(row) * heads + head) * p.head_dim;
    if (head < p.num_heads) {
        uint8_t* to = p.queries + (uint64_t(row) * p.num_heads + head) * p.head_dim * sizeof(T);
        rotate_head<T>(p, from, p.positions[row], p.query_weight, to);
        return;
    }
    bool is_key = head < p.num_heads + p.num_kv_heads;
    uint32_t kv_head = head - p.num_heads - (is_key ? 0 : p.num_kv_heads);
    uint64_t place = (uint64_t(slot / p.block_size) * p.num_kv_heads + kv_head) * p.block_size + slot % p.block_size;
    uint64_t bytes = place * p.head_dim * sizeof(E);
    if (is_key) {
        rotate_head<E>(p, from, p.positions[row], p.key_weight, p.keys + bytes);
    } else {
        copy_head<E>(p, from, p.values + bytes);
    }
}

#define ROPE_APPEND(T, E)                                            \
    KERNEL(rope_append_##T##_##E, RopeAppendParams, ROPE_WARPS * WARP) { \
        grid_dependency_wait();                                      \
        grid_dependency_launch();                                    \
        append_row<T, E>(p);                                         \
    }

ROPE_APPEND(bf16, bf16)
ROPE_APPEND(bf16, fp8)
ROPE_APPEND(f16, f16)
ROPE_APPEND(f16, fp8)
