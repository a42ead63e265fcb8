// Attention of few query rows over many positions, for decoding. It is bound by the bandwidth for keys and values.
//
// A fixed grid processes the items that the host has planned: up to sixteen rows that share a KV head, over one split or over
// all positions that they see. Lengths are read from memory only, so a recorded launch serves every step. While one stretch
// is computed, keys and values of the next stretches, including those of the next items, are copied to shared memory.
//
// Four warps share a stretch: each computes the scores of sixteen positions, and then a quarter of the value columns over all
// 64. If the splits of a tile are separate items, the block that finishes the last of them merges all of them in order.
#include "attention.cuh"

constexpr uint32_t SPLIT_WARPS = 4;
// The number of partials that are loaded together when they are merged.
constexpr uint32_t MERGE_AHEAD = 8;

template <typename T, typename E, uint32_t D>
struct SplitShared {
    static constexpr uint32_t TILE_BYTES = STRETCH * D * sizeof(E);
    static constexpr uint32_t QUERY_BYTES = TILE_ROWS * D * sizeof(T);
    static constexpr uint32_t STAGE_BYTES = 2 * TILE_BYTES + QUERY_BYTES;
    static constexpr uint32_t WEIGHT_BYTES = TILE_ROWS * STRETCH * sizeof(T);

    unsigned char* memory;
    uint32_t stages;

    DEVICE unsigned char* keys(uint32_t stage) const { return memory + stage * STAGE_BYTES; }
    DEVICE unsigned char* values(uint32_t stage) const { return keys(stage) + TILE_BYTES; }
    DEVICE unsigned char* queries(uint32_t stage) const { return keys(stage) + 2 * TILE_BYTES; }
    DEVICE unsigned char* weights() const { return memory + stages * STAGE_BYTES; }
    // [warps][rows]
    DEVICE float* maxima() const { return reinterpret_cast<float*>(weights() + WEIGHT_BYTES); }
    DEVICE uint32_t* is_last() const { return reinterpret_cast<uint32_t*>(maxima() + SPLIT_WARPS * TILE_ROWS); }
};

// Copies the stretches of the block's items ahead of the computation. Keys and values are one group of copies each, committed
// even if nothing is left, so that groups can be counted. Each warp copies the sixteen keys whose scores it will compute.
template <typename T, typename E, uint32_t D>
struct Loader {
    SplitShared<T, E, D> shared;
    uint32_t next_item, end_item;
    Item item;
    Span seen;
    uint32_t stretch;
    uint32_t stage;  // the stage for the next keys
    // Whether the values of the last keys have not been requested yet.
    bool owes_values;
    Sixteen owed;

    DEVICE void begin(const SplitShared<T, E, D>& memory, uint32_t first, uint32_t end) {
        shared = memory;
        next_item = first;
        end_item = end;
        item.end_stretch = stretch = stage = 0;
        owes_values = false;
    }

    DEVICE void keys(const AttentionParams& p) {
        bool first = stretch == item.end_stretch && next_item < end_item;
        if (first) {
            item = read_item(p, next_item++);
            seen = span_of_item(p, item);
            stretch = item.first_stretch;
            load_queries<T, D>(p, shared.queries(stage), item, warp() * 4, 4);
        }
        owes_values = stretch < item.end_stretch;
        if (owes_values) {
            owed = locate(p, item, seen, stretch * STRETCH + warp() * 16);
            load_sixteen<E, D>(p, shared.keys(stage), warp() * 16, p.keys, owed);
            stretch++;
        }
        async_copy_commit();
        stage = stage + 1 == shared.stages ? 0 : stage + 1;
    }

    // Requests the values of the keys that were requested last.
    DEVICE void values(const AttentionParams& p) {
        uint32_t last = stage == 0 ? shared.stages - 1 : stage - 1;
        if (owes_values) load_sixteen<E, D>(p, shared.values(last), warp() * 16, p.values, owed);
        owes_values = false;
        async_copy_commit();
    }
};

// Computes the scores of sixteen query rows with the warp's sixteen positions.
template <typename T, typename E, uint32_t D>
DEVICE void score_sixteen(float (&s)[2][4], const uint32_t (&q)[D / 16][4], const unsigned char* keys) {
    UNROLL
    for (uint32_t i = 0; i < 8; i++) s[i / 4][i % 4] = 0.0f;
    UNROLL
    for (uint32_t step = 0; step < D / 16; step += 2) {
        uint32_t b[2][2][2];
        key_fragments<T, E, D>(b, keys, warp() * 16, step);
        UNROLL
        for (uint32_t i = 0; i < 4; i++) Number<T>::multiply(s[i % 2], q[step + i / 2], b[i / 2][i % 2]);
    }
}

// Writes the weights of the warp's sixteen positions to shared memory, where all warps read them.
template <typename T>
DEVICE void store_weights(unsigned char* tile, const float (&s)[2][4], const float (&reference)[2]) {
    using Rows = Tile<T, STRETCH>;
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t j = i / 2, row = i % 2;
        float low = fast_exp2(s[j][2 * row] - reference[row]), high = fast_exp2(s[j][2 * row + 1] - reference[row]);
        unsigned char* to = tile + Rows::offset(lane() / 4 + 8 * row, warp() * 2 + j) + lane() % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = Number<T>::pack(low, high);
    }
}

// The maxima over all four warps.
DEVICE void exchange_maxima(const float* all, float (&maxima)[2]) {
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        const float* of_row = all + lane() / 4 + 8 * row;
        maxima[row] = max_(max_(of_row[0], of_row[TILE_ROWS]), max_(of_row[2 * TILE_ROWS], of_row[3 * TILE_ROWS]));
    }
}

template <uint32_t G>
DEVICE void merge_split(State<G>& total, const State<G>& part) {
    Shares shares[2];
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        shares[row] = merge_shares(total.max[row], part.max[row], part.sum[2 * row]);
        total.sum[2 * row] = shares[row].merge(total.sum[2 * row], part.sum[2 * row]);
    }
    UNROLL
    for (uint32_t i = 0; i < G * 8; i++) {
        float& value = total.o[i / 8][i / 4 % 2][i % 4];
        value = shares[i % 4 / 2].merge(value, part.o[i / 8][i / 4 % 2][i % 4]);
    }
}

DEVICE float* partial_row(const AttentionParams& p, const Item& item, uint32_t split, uint32_t row) {
    return p.partials + uint64_t(item.partial + split * item.rows + row) * (p.head_dim + 4);
}

// Stores the warp's columns of a split for the block that will merge them.
template <typename E, uint32_t G>
DEVICE void store_partial(const AttentionParams& p, const Item& item, const State<G>& part) {
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        uint32_t at = lane() / 4 + 8 * row;
        if (at >= item.rows) continue;
        float* to = partial_row(p, item, item.split, at);
        if (warp() == 0 && lane() % 4 == 0) to[0] = part.max[row], to[1] = part.sum[2 * row];
        UNROLL
        for (uint32_t i = 0; i < 2 * G; i++) {
            uint32_t column = (warp() * G + i / 2) * 16 + Columns<E>::first(i % 2);
            if (column >= p.head_dim) continue;
            to[4 + column] = Columns<E>::low(part.o[i / 2], i % 2, row);
            to[5 + column] = Columns<E>::high(part.o[i / 2], i % 2, row);
        }
    }
}

// Writes the warp's columns of the finished rows.
template <typename T, typename E, uint32_t G>
DEVICE void write_rows(const AttentionParams& p, const Item& item, const State<G>& total) {
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        uint32_t at = lane() / 4 + 8 * row;
        if (at >= item.rows) continue;
        uint64_t to = query_row(p, item, at);
        float inverse = divide(1.0f, total.sum[2 * row]);
        UNROLL
        for (uint32_t i = 0; i < 2 * G; i++) {
            uint32_t column = (warp() * G + i / 2) * 16 + Columns<E>::first(i % 2);
            if (column >= p.head_dim) continue;
            float low = Columns<E>::low(total.o[i / 2], i % 2, row), high = Columns<E>::high(total.o[i / 2], i % 2, row);
            write_pair<T>(p, to, column, low * inverse, high * inverse);
        }
    }
}

struct alignas(16) Four {
    float x[4];
};

// Merges four columns of a row over all splits.
template <typename T>
DEVICE void merge_columns(const AttentionParams& p, const Item& item, uint32_t row, uint32_t column) {
    float max = minus_infinity(), sum = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (uint32_t first = 0; first < item.splits; first += MERGE_AHEAD) {
        float part_max[MERGE_AHEAD], part_sum[MERGE_AHEAD];
        Four part[MERGE_AHEAD];
        UNROLL
        for (uint32_t i = 0; i < MERGE_AHEAD; i++) {
            // Beyond the end, the last partial is read again and not used.
            const float* from = partial_row(p, item, min_index(first + i, item.splits - 1), row);
            part_max[i] = from[0];
            part_sum[i] = from[1];
            part[i] = *reinterpret_cast<const Four*>(from + 4 + column);
        }
        UNROLL
        for (uint32_t i = 0; i < MERGE_AHEAD; i++) {
            if (first + i >= item.splits) continue;
            Shares shares = merge_shares(max, part_max[i], part_sum[i]);
            sum = shares.merge(sum, part_sum[i]);
            UNROLL
            for (uint32_t c = 0; c < 4; c++) o[c] = shares.merge(o[c], part[i].x[c]);
        }
    }
    float inverse = divide(1.0f, sum);
    uint64_t to = query_row(p, item, row);
    write_pair<T>(p, to, column, o[0] * inverse, o[1] * inverse);
    write_pair<T>(p, to, column + 2, o[2] * inverse, o[3] * inverse);
}

// Counts a stored split. The block that stores the last split of a tile merges all of them.
template <typename T>
DEVICE void finish_split(const AttentionParams& p, const Item& item, uint32_t* is_last) {
    block_barrier();
    if (threadIdx.x == 0) {
        // Because of the barrier before, the fence covers all that the block has written.
        global_fence();
        uint32_t done = atomic_add(p.counters + item.counter, 1) + 1;
        if (done == item.splits) p.counters[item.counter] = 0;
        *is_last = done == item.splits;
    }
    block_barrier();
    if (*is_last == 0) return;
    global_fence();
    uint32_t fours = p.head_dim / 4;
    for (uint32_t i = threadIdx.x; i < item.rows * fours; i += SPLIT_WARPS * WARP) {
        merge_columns<T>(p, item, i / fours, i % fours * 4);
    }
}

template <typename T, typename E, uint32_t D>
DEVICE void attend_items(const AttentionParams& p, unsigned char* memory) {
    constexpr uint32_t G = D / 16 / SPLIT_WARPS;
    const SplitShared<T, E, D> shared{memory, p.stages};
    uint32_t begin = p.plan[blockIdx.x], end = p.plan[blockIdx.x + 1];
    Loader<T, E, D> loader;
    loader.begin(shared, begin, end);
    for (uint32_t i = 0; i < p.stages; i++) {
        if (i > 0) loader.values(p);
        loader.keys(p);
    }
    uint32_t stage = 0;
    for (uint32_t index = begin; index < end; index++) {
        const Item item = read_item(p, index);
        const Span rows[2] = {span_of_row(p, item, lane() / 4), span_of_row(p, item, lane() / 4 + 8)};
        // The positions that every row sees.
        const Span common{span_of_row(p, item, item.rows - 1).from, span_of_row(p, item, 0).to};
        uint32_t q[D / 16][4];
        State<G> part, total;
        part.clear();
        total.clear();
        for (uint32_t stretch = item.first_stretch; stretch < item.end_stretch; stretch++) {
            // Waits for all but the newest 2 · stages - 2 groups, that is, for the keys of this stretch.
            await_copies(2 * p.stages - 2);
            if (stretch == item.first_stretch) {
                block_barrier();
                UNROLL
                for (uint32_t step = 0; step < D / 16; step++) query_fragment<T, E, D>(q[step], shared.queries(stage), 0, step);
            } else {
                warp_barrier();
            }
            float s[2][4], maxima[2], reference[2], factors[2];
            score_sixteen<T, E, D>(s, q, shared.keys(stage));
            uint32_t first = stretch * STRETCH + warp() * 16;
            mask_scores<2>(p, s, first, rows, first >= common.from && first + 16 <= common.to);
            row_maxima<2>(s, maxima);
            UNROLL
            for (uint32_t row = 0; row < 2; row++) {
                if (lane() % 4 == 0) shared.maxima()[warp() * TILE_ROWS + lane() / 4 + 8 * row] = maxima[row];
            }
            block_barrier();
            // All warps have finished with the values of the previous stretch and the keys of this one.
            loader.values(p);
            loader.keys(p);
            exchange_maxima(shared.maxima(), maxima);
            UNROLL
            for (uint32_t row = 0; row < 2; row++) factors[row] = raise_maximum(part.max[row], maxima[row], reference[row]);
            store_weights<T>(shared.weights(), s, reference);
            part.scale(factors);
            await_copies(2 * p.stages - 1);
            block_barrier();
            uint32_t weights[4][4];
            UNROLL
            for (uint32_t step = 0; step < 4; step++) query_fragment<T, T, STRETCH>(weights[step], shared.weights(), 0, step);
            part.template add_values<T, E, D>(weights, shared.values(stage), warp() * G);
            bool split_ends = (stretch + 1) % SPLIT_STRETCHES == 0 || stretch + 1 == item.end_stretch;
            if (split_ends && item.partial == WHOLE) {
                merge_split(total, part);
                part.clear();
            }
            stage = stage + 1 == p.stages ? 0 : stage + 1;
        }
        if (item.partial == WHOLE) {
            write_rows<T, E>(p, item, total);
        } else {
            store_partial<E>(p, item, part);
            finish_split<T>(p, item, shared.is_last());
        }
    }
}

#define ATTENTION_SPLIT(T, E, D)                                                            \
    KERNEL_OCCUPANCY(attention_split_##T##_##E##_##D, AttentionParams, SPLIT_WARPS * WARP, 2) { \
        DYNAMIC_SHARED(memory);                                                             \
        grid_dependency_wait();                                                             \
        grid_dependency_launch();                                                           \
        attend_items<T, E, D>(p, memory);                                                   \
    }

ATTENTION_SPLIT(bf16, bf16, 64)
ATTENTION_SPLIT(bf16, bf16, 128)
ATTENTION_SPLIT(bf16, bf16, 256)
ATTENTION_SPLIT(bf16, fp8, 64)
ATTENTION_SPLIT(bf16, fp8, 128)
ATTENTION_SPLIT(bf16, fp8, 256)
ATTENTION_SPLIT(f16, f16, 64)
ATTENTION_SPLIT(f16, f16, 128)
ATTENTION_SPLIT(f16, f16, 256)
ATTENTION_SPLIT(f16, fp8, 64)
ATTENTION_SPLIT(f16, fp8, 128)
ATTENTION_SPLIT(f16, fp8, 256)
