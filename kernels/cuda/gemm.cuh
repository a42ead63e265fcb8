// The epilogue of a dense product, shared by its kernels: sums go from the tensor cores' registers to shared memory, and
// from there to the output, so that whole rows are written at a time.
//
// A tile of the product is FEATURES rows of the weights by TOKENS rows of activations. Sums are staged with one row for each
// token, padded by four words: the eight features and four pairs of tokens that a warp stores at once are in 32 different
// banks.
#pragma once

// How the output is written. The numbers are those of gpu/gemm.rs.
constexpr uint32_t STORE_F32 = 0, STORE_F16 = 1, STORE_BF16 = 2, ADD_F32 = 3;

struct ProductOutput {
    void* rows;          // [m, row_stride] of the kind's element; n of each row are written
    const float* bias;   // [n], or null
    const float* w_scales;  // [n], for 8-bit operands, or null
    const float* x_scales;  // [m], for 8-bit operands, or null
    uint64_t row_stride;    // elements
    uint32_t m, n;
    uint32_t kind;
    // Not 0 if rows start at multiples of 16 bytes, so that four elements within n can be written at once.
    uint32_t in_fours;
};

struct alignas(8) Bytes8 {
    uint32_t x, y;
};

template <uint32_t FEATURES>
constexpr uint32_t STAGED_ROW = FEATURES + 4;

// Stages one m16n8 block of sums from a warp's registers. Its rows are features from `feature` on, its columns are tokens from
// `token` on, both relative to the staged part.
template <uint32_t FEATURES>
DEVICE void stage_sums(float* staged, uint32_t feature, uint32_t token, float c0, float c1, float c2, float c3) {
    uint32_t g = lane() / 4, t = lane() % 4;
    float* at = staged + (token + 2 * t) * STAGED_ROW<FEATURES> + feature + g;
    at[0] = c0;
    at[STAGED_ROW<FEATURES>] = c1;
    at[8] = c2;
    at[STAGED_ROW<FEATURES> + 8] = c3;
}

struct alignas(16) Quad {
    float x, y, z, w;
};

// Four consecutive features (fewer at the right edge): computes their final values from the sums, and writes them.
struct Columns {
    const ProductOutput& out;
    uint32_t feature, count;

    DEVICE Columns(const ProductOutput& out_, uint32_t feature_) : out(out_), feature(feature_) {
        count = feature >= out.n ? 0 : out.n - feature < 4 ? out.n - feature : 4;
    }
    // Loads per-feature values. Called again for each row: they are cached, and the registers are needed for sums.
    DEVICE Quad load(const float* values) {
        Quad v{};
        if (count > 0) v.x = values[feature];
        if (count > 1) v.y = values[feature + 1];
        if (count > 2) v.z = values[feature + 2];
        if (count > 3) v.w = values[feature + 3];
        return v;
    }
    DEVICE bool in_one() { return count == 4 && out.in_fours; }
    DEVICE uint64_t at(uint32_t token) { return token * out.row_stride + feature; }

    // Applies scales and bias. The order of the roundings is part of the result.
    DEVICE Quad finished(Quad v, uint32_t token) {
        if (out.x_scales != nullptr) {
            float s = out.x_scales[token];
            Quad w = load(out.w_scales);
            v = Quad{v.x * s * w.x, v.y * s * w.y, v.z * s * w.z, v.w * s * w.w};
        }
        if (out.bias != nullptr) {
            Quad bias = load(out.bias);
            v = Quad{v.x + bias.x, v.y + bias.y, v.z + bias.z, v.w + bias.w};
        }
        return v;
    }

    DEVICE Quad* floats(uint32_t token) { return reinterpret_cast<Quad*>(static_cast<float*>(out.rows) + at(token)); }
    // Writes four values. `old` are the previous values, used only by ADD_F32.
    DEVICE void write(uint32_t token, Quad v, Quad old) {
        Bytes8* halves = reinterpret_cast<Bytes8*>(static_cast<uint16_t*>(out.rows) + at(token));
        if (out.kind == STORE_F32) *floats(token) = v;
        if (out.kind == STORE_F16) *halves = Bytes8{pack_f16(v.x, v.y), pack_f16(v.z, v.w)};
        if (out.kind == STORE_BF16) *halves = Bytes8{pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
        if (out.kind == ADD_F32) *floats(token) = Quad{old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w};
    }
    DEVICE void write_one(uint64_t to, float value) {
        if (out.kind == STORE_F32) static_cast<float*>(out.rows)[to] = value;
        if (out.kind == STORE_F16) static_cast<f16*>(out.rows)[to] = to_f16(value);
        if (out.kind == STORE_BF16) static_cast<bf16*>(out.rows)[to] = to_bf16(value);
        if (out.kind == ADD_F32) static_cast<float*>(out.rows)[to] = static_cast<float*>(out.rows)[to] + value;
    }
    DEVICE void write_singly(uint32_t token, Quad v) {
        if (count > 0) write_one(at(token), v.x);
        if (count > 1) write_one(at(token) + 1, v.y);
        if (count > 2) write_one(at(token) + 2, v.z);
        if (count > 3) write_one(at(token) + 3, v.w);
    }
};

// Writes TOKENS staged rows as tokens from `first_token` and features from `first_feature` on, with THREADS threads of which
// this is number `thread`. Each thread writes the same columns of rows that are ROWS apart. Values beyond m or n are dropped.
template <uint32_t FEATURES, uint32_t TOKENS, uint32_t THREADS>
DEVICE void write_staged(const ProductOutput& out, const float* staged, uint32_t first_token, uint32_t first_feature, uint32_t thread) {
    constexpr uint32_t QUADS = FEATURES / 4, ROWS = THREADS / QUADS, TOGETHER = TOKENS < 2 * ROWS ? 1 : 2;
    static_assert(THREADS % QUADS == 0 && (TOGETHER == 1 || TOKENS % (TOGETHER * ROWS) == 0), "threads have whole columns");
    uint32_t col = thread % QUADS * 4, left = out.m - first_token, rows = left < TOKENS ? left : TOKENS;
    Columns columns(out, first_feature + col);
    NO_UNROLL for (uint32_t first = thread / QUADS; first < rows; first += TOGETHER * ROWS) {
        // All old values are requested before the first is used.
        Quad old[TOGETHER] = {};
        UNROLL for (uint32_t i = 0; i < TOGETHER; i++) {
            uint32_t row = first + i * ROWS;
            if (out.kind == ADD_F32 && columns.in_one() && row < rows) old[i] = *columns.floats(first_token + row);
        }
        UNROLL for (uint32_t i = 0; i < TOGETHER; i++) {
            uint32_t row = first + i * ROWS, token = first_token + row;
            if (row >= rows) break;
            Quad v = columns.finished(*reinterpret_cast<const Quad*>(staged + row * STAGED_ROW<FEATURES> + col), token);
            if (columns.in_one()) {
                columns.write(token, v, old[i]);
            } else {
                columns.write_singly(token, v);
            }
        }
    }
}
