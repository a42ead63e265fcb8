// Attention of many query rows, for prefill. It is bound by the tensor cores.
//
// A block processes consecutive rows of a sequence that share a KV head, sixteen rows per warp, over all stretches that any of
// them sees. A warp keeps the state of the current split in registers and the total over earlier splits in shared memory.
#include "attention.cuh"

constexpr uint32_t MAX_TILE_WARPS = 4;

template <typename T, typename E, uint32_t D>
struct TileShared {
    // The query fragments of larger heads would leave too few registers.
    static constexpr bool QUERIES_IN_REGISTERS = D <= 128;
    static constexpr uint32_t TILE_BYTES = STRETCH * D * sizeof(E);
    static constexpr uint32_t QUERY_BYTES = TILE_ROWS * D * sizeof(T);
    // If queries are held in registers, a warp's total reuses their shared memory once they have been read.
    static constexpr uint32_t TOTAL_BYTES = TILE_ROWS * D * sizeof(float);
    static constexpr uint32_t WARP_BYTES = TOTAL_BYTES + (QUERIES_IN_REGISTERS ? 0 : QUERY_BYTES);

    unsigned char* memory;
    uint32_t stages;

    DEVICE unsigned char* keys(uint32_t stage) const { return memory + 2 * stage * TILE_BYTES; }
    DEVICE unsigned char* values(uint32_t stage) const { return keys(stage) + TILE_BYTES; }
    DEVICE unsigned char* own() const { return memory + 2 * stages * TILE_BYTES + warp() * WARP_BYTES; }
    // Value `index` of this lane's total.
    DEVICE float& total(uint32_t index) const { return reinterpret_cast<float*>(own())[index * WARP + lane()]; }
    DEVICE unsigned char* queries() const { return own() + (QUERIES_IN_REGISTERS ? 0 : TOTAL_BYTES); }
};

template <typename T, typename E, uint32_t D>
struct Queries {
    uint32_t fragments[TileShared<T, E, D>::QUERIES_IN_REGISTERS ? D / 16 : 1][4];

    DEVICE void read(const unsigned char* tile) {
        if constexpr (TileShared<T, E, D>::QUERIES_IN_REGISTERS) {
            UNROLL
            for (uint32_t step = 0; step < D / 16; step++) query_fragment<T, E, D>(fragments[step], tile, 0, step);
            warp_barrier();
        }
    }

    DEVICE void get(uint32_t (&a)[4], const unsigned char* tile, uint32_t step) const {
        if constexpr (TileShared<T, E, D>::QUERIES_IN_REGISTERS) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) a[i] = fragments[step][i];
        } else {
            query_fragment<T, E, D>(a, tile, 0, step);
        }
    }
};

// All warps start to copy a stretch.
template <typename T, typename E, uint32_t D>
DEVICE void load_stretch(const AttentionParams& p, const TileShared<T, E, D>& shared, const Item& item, Span seen, uint32_t stretch, uint32_t stage) {
    for (uint32_t part = warp(); part < STRETCH / 16; part += blockDim.x / WARP) {
        Sixteen at = locate(p, item, seen, stretch * STRETCH + part * 16);
        load_sixteen<E, D>(p, shared.keys(stage), part * 16, p.keys, at);
        load_sixteen<E, D>(p, shared.values(stage), part * 16, p.values, at);
    }
}

// Computes the scores of the warp's rows with all positions of a stretch.
template <typename T, typename E, uint32_t D>
DEVICE void score_stretch(float (&s)[8][4], const Queries<T, E, D>& queries, const unsigned char* query_tile, const unsigned char* keys) {
    UNROLL
    for (uint32_t i = 0; i < 32; i++) s[i / 4][i % 4] = 0.0f;
    UNROLL
    for (uint32_t step = 0; step < D / 16; step += 2) {
        uint32_t q[2][4];
        queries.get(q[0], query_tile, step);
        queries.get(q[1], query_tile, step + 1);
        UNROLL
        for (uint32_t part = 0; part < 4; part++) {
            uint32_t b[2][2][2];
            key_fragments<T, E, D>(b, keys, part * 16, step);
            UNROLL
            for (uint32_t i = 0; i < 4; i++) Number<T>::multiply(s[2 * part + i % 2], q[i / 2], b[i / 2][i % 2]);
        }
    }
}

// Converts a stretch's scores to weights, as the operand of the product with its values.
template <typename T>
DEVICE void weigh(uint32_t (&weights)[4][4], const float (&s)[8][4], const float (&reference)[2]) {
    UNROLL
    for (uint32_t i = 0; i < 16; i++) {
        uint32_t j = i / 2, row = i % 2;
        float low = fast_exp2(s[j][2 * row] - reference[row]), high = fast_exp2(s[j][2 * row + 1] - reference[row]);
        weights[j / 2][j % 2 * 2 + row] = Number<T>::pack(low, high);
    }
}

// Merges the current split with the total in shared memory, if `has_total` says that there is one. The result is in `part`.
template <typename T, typename E, uint32_t D>
DEVICE void merge_split(const TileShared<T, E, D>& shared, State<D / 16>& part, float (&total_max)[2], float (&total_sum)[2], bool has_total) {
    Shares shares[2];
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        shares[row] = merge_shares(total_max[row], part.max[row], part.sum[2 * row]);
        total_sum[row] = shares[row].merge(total_sum[row], part.sum[2 * row]);
    }
    UNROLL
    for (uint32_t i = 0; i < D / 2; i++) {
        float& value = part.o[i / 8][i / 4 % 2][i % 4];
        value = shares[i % 4 / 2].merge(has_total ? shared.total(i) : 0.0f, value);
    }
}

template <typename T, typename E, uint32_t D>
DEVICE void write_tile(const AttentionParams& p, const Item& item, const State<D / 16>& state, const float (&sums)[2]) {
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        uint32_t at = warp() * TILE_ROWS + lane() / 4 + 8 * row;
        if (at >= item.rows) continue;
        uint64_t to = query_row(p, item, at);
        float inverse = divide(1.0f, sums[row]);
        UNROLL
        for (uint32_t i = 0; i < D / 8; i++) {
            uint32_t column = i / 2 * 16 + Columns<E>::first(i % 2);
            if (column >= p.head_dim) continue;
            float low = Columns<E>::low(state.o[i / 2], i % 2, row), high = Columns<E>::high(state.o[i / 2], i % 2, row);
            write_pair<T>(p, to, column, low * inverse, high * inverse);
        }
    }
}

template <typename T, typename E, uint32_t D>
DEVICE void attend_tile(const AttentionParams& p, unsigned char* memory) {
    const TileShared<T, E, D> shared{memory, p.stages};
    Item item = read_item(p, blockIdx.x);
    item.kv_head = blockIdx.y;
    const Span seen = span_of_item(p, item);
    const uint32_t first_row = warp() * TILE_ROWS, last_row = min_index(first_row + TILE_ROWS, item.rows) - 1;
    const bool has_rows = first_row < item.rows;
    const Span rows[2] = {span_of_row(p, item, first_row + lane() / 4), span_of_row(p, item, first_row + lane() / 4 + 8)};
    // The positions that any row of the warp sees, and those that every row sees.
    const Span any{span_of_row(p, item, first_row).from, span_of_row(p, item, last_row).to};
    const Span common{span_of_row(p, item, last_row).from, span_of_row(p, item, first_row).to};

    // The tile's offsets are relative to the warp's rows. This works because sixteen rows are two periods of its permutation.
    load_queries<T, D>(p, shared.queries() - first_row * Tile<T, D>::ROW_BYTES, item, first_row, TILE_ROWS);
    load_stretch(p, shared, item, seen, item.first_stretch, 0);
    async_copy_commit();

    Queries<T, E, D> queries;
    State<D / 16> part;
    part.clear();
    float total_max[2] = {minus_infinity(), minus_infinity()}, total_sum[2] = {0.0f, 0.0f};
    bool has_total = false;
    uint32_t stage = 0;
    for (uint32_t stretch = item.first_stretch; stretch < item.end_stretch; stretch++) {
        async_copy_wait<0>();
        block_barrier();
        bool more = stretch + 1 < item.end_stretch;
        if (p.stages == 2 && more) {
            // All warps have finished the previous stretch, which this copy overwrites.
            load_stretch(p, shared, item, seen, stretch + 1, 1 - stage);
            async_copy_commit();
        }
        if (stretch == item.first_stretch) queries.read(shared.queries());
        uint32_t first = stretch * STRETCH;
        if (has_rows && first < any.to && first + STRETCH > any.from) {
            float s[8][4], maxima[2], reference[2], factors[2];
            score_stretch(s, queries, shared.queries(), shared.keys(stage));
            mask_scores<8>(p, s, first, rows, first >= common.from && first + STRETCH <= common.to);
            row_maxima<8>(s, maxima);
            UNROLL
            for (uint32_t row = 0; row < 2; row++) factors[row] = raise_maximum(part.max[row], maxima[row], reference[row]);
            uint32_t weights[4][4];
            weigh<T>(weights, s, reference);
            part.scale(factors);
            part.template add_values<T, E, D>(weights, shared.values(stage), 0);
        }
        if ((stretch + 1) % SPLIT_STRETCHES == 0 || !more) {
            merge_split(shared, part, total_max, total_sum, has_total);
            if (more) {
                UNROLL
                for (uint32_t i = 0; i < D / 2; i++) shared.total(i) = part.o[i / 8][i / 4 % 2][i % 4];
                part.clear();
                has_total = true;
            }
        }
        if (p.stages == 1 && more) {
            block_barrier();
            load_stretch(p, shared, item, seen, stretch + 1, 0);
            async_copy_commit();
        }
        if (p.stages == 2) stage = 1 - stage;
    }
    write_tile<T, E, D>(p, item, part, total_sum);
}

#define ATTENTION_TILE(T, E, D)                                                          \
    KERNEL(attention_tile_##T##_##E##_##D, AttentionParams, MAX_TILE_WARPS * WARP) {     \
        DYNAMIC_SHARED(memory);                                                          \
        grid_dependency_wait();                                                          \
        grid_dependency_launch();                                                        \
        attend_tile<T, E, D>(p, memory);                                                 \
    }

ATTENTION_TILE(bf16, bf16, 64)
ATTENTION_TILE(bf16, bf16, 128)
ATTENTION_TILE(bf16, bf16, 256)
ATTENTION_TILE(bf16, fp8, 64)
ATTENTION_TILE(bf16, fp8, 128)
ATTENTION_TILE(bf16, fp8, 256)
ATTENTION_TILE(f16, f16, 64)
ATTENTION_TILE(f16, f16, 128)
ATTENTION_TILE(f16, f16, 256)
ATTENTION_TILE(f16, fp8, 64)
ATTENTION_TILE(f16, fp8, 128)
ATTENTION_TILE(f16, fp8, 256)
