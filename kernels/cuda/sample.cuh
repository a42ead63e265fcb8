// Shared by the sampling kernels: parameters, per-row state, integer masses, sums over a block. The CPU's code is in
// kernels/src/sample, and every result here has the same bits: sums are of integers, exp is the same polynomial, and ties go
// to the lower id.
//
// A row of logits is divided into slices of SLICE tokens, with one block for each. The number of blocks for a row depends only
// on the vocabulary. Results for the whole row between two steps are computed by the block that finishes last (arrive_last).
#pragma once

#include "prelude.cuh"

constexpr uint32_t SLICE = 4096;
constexpr uint32_t SLICE_THREADS = 256;
constexpr uint32_t SLICE_WARPS = SLICE_THREADS / WARP;
// The number of tokens of a slice that thread t processes: t, t + 256, …. The best of them is the thread's group maximum.
constexpr uint32_t PER_THREAD = SLICE / SLICE_THREADS;
// The number of slices of the largest vocabulary, 2^20 - 1.
constexpr uint32_t MAX_SLICES = 256;
static_assert(MAX_SLICES <= SLICE_THREADS, "the last block takes a slice a thread");

constexpr uint32_t PICK_THREADS = 512;
constexpr uint32_t PICK_WARPS = PICK_THREADS / WARP;
// The maximum number of a row's candidates that are sorted in shared memory. A row with more is searched as a whole.
constexpr uint32_t LISTED = 4096;

// The mass of the most likely token, 2^44, and how tokens are packed with masses and keys. The same as in sample/mass.rs.
constexpr uint64_t UNIT = uint64_t(1) << 44;
constexpr uint32_t ID_BITS = 20;
constexpr uint32_t ID_MASK = (1u << ID_BITS) - 1;
constexpr uint64_t NO_ITEM = ~uint64_t(0);

constexpr uint32_t NONE = 0xffffffffu;
constexpr float INFINITE = __builtin_huge_valf();

// The flags of a row. DRAW: the row is not greedy. GATHER: its candidates follow from the maximum (top_k or min_p). NUCLEUS:
// its candidates follow from the total mass (only top_p).
constexpr uint32_t DRAW = 1, GATHER = 2, NUCLEUS = 4, LOGPROBS = 8, ALLOWED = 16, PENALTIES = 32;

// One row's parameters. Lists are in `words` of the header, from the given word on: `bias` as pairs of token and f32,
// `occurrences` as pairs of token and count, `barred` as tokens, `allowed` as one bit for each token.
struct SampleRow {
    uint64_t bits;
    uint64_t min_mass;
    float scale, top_p;
    float repetition, frequency, presence;
    uint32_t flags;
    uint32_t top_k;  // 0 when off
    uint32_t num_logprobs;
    uint32_t pending;  // an index in `sampled` whose token counts as emitted, or NONE
    uint32_t bias, num_bias;
    uint32_t barred, num_barred;
    uint32_t occurrences, num_occurrences;
    uint32_t allowed;
};

// The header that a step uploads with its rows, so that the addresses with which kernels are launched never change.
struct SampleHeader {
    const uint32_t* words;
    float* saved;   // one for each word: if the word is a token, the token's logit before it was changed
    uint32_t turn;  // which half of `sampled` this step writes; the other half is the previous step's
    uint32_t unused[3];
};

// One row's state between the kernels of a step. The counters are zero between steps.
struct SampleState {
    uint64_t bound_mass;  // candidates of a nucleus have at least this mass
    uint64_t total;       // the mass of the row, for a nucleus
    uint32_t arrived[3];
    uint32_t is_valid;
    float max;
    float raw_max;
    uint32_t bound_distance;  // candidates of a top-k are in this bucket of distances or in a nearer one
    uint32_t listed;          // the number of candidates; those beyond LISTED are not in the list
    float pending_raw;
    uint32_t unused;
};

// A row's result. The tops follow the results of all rows.
struct SampleResult {
    uint32_t token, is_valid, rank;
    float raw, raw_max;
    uint32_t total_low, total_high;
    uint32_t unused;
};
struct SampleTop {
    uint32_t token;
    float raw;
};

struct SampleParams {
    float* logits;  // [rows, vocab], changed in place
    const SampleHeader* header;
    const SampleRow* rows;
    SampleState* states;
    uint32_t* sampled;  // [2, max_rows]
    SampleResult* results;
    SampleTop* tops;         // [max_rows, max_logprobs]
    uint32_t* slice_counts;  // [max_rows, slices]
    uint64_t* slice_sums;    // [max_rows, slices]
    uint32_t* groups;        // [max_rows, slices, SLICE_THREADS]
    uint64_t* slice_tops;    // [max_rows, slices, max_logprobs]
    uint64_t* list;          // [max_rows, LISTED]
    uint32_t vocab, slices, max_rows, max_logprobs;
};

// ---- orders

// A key that is ordered like the logits. Both zeros have the same key, and no logit has key 0.
DEVICE uint32_t ascending(float logit) {
    uint32_t bits = float_as_uint(logit == 0.0f ? 0.0f : logit);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
DEVICE float from_ascending(uint32_t key) { return uint_as_float(key >> 31 ? key ^ 1u << 31 : ~key); }
// The key of a NaN or of +inf, which makes the row invalid. It is above the key of every other number.
constexpr uint32_t POISON = 0xffffffffu;
constexpr uint32_t KEY_OF_NEGATIVE_INFINITY = 0x007fffffu;

// Orders tokens by higher logit, then by lower id: a larger number is better, and 0 means no token.
DEVICE uint64_t better_first(uint32_t key, uint32_t id) { return uint64_t(key) << 32 | uint32_t(~id); }

DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// ---- masses

// A weight's integer mass, in units of 2^-44, rounded to nearest, ties to even. The product is exact.
DEVICE uint64_t mass_of(float weight) {
    float bounded = weight < 1.0f ? weight : 1.0f;
    return round_to_u64(bounded * 17592186044416.0f);
}
DEVICE uint64_t mass_of(float logit, float max, float scale) { return mass_of(exact_exp((logit - max) * scale)); }

// Packs a token of positive mass. Ascending order is descending mass, then ascending id.
DEVICE uint64_t candidate(uint64_t mass, uint32_t id) { return (UNIT - mass) << ID_BITS | id; }
DEVICE uint64_t candidate_mass(uint64_t candidate) { return UNIT - (candidate >> ID_BITS); }

// The mass that a nucleus of share `top_p` must reach.
DEVICE uint64_t nucleus_mass(float top_p, uint64_t total) {
    uint64_t mass = uint64_t(ceiling(double(top_p) * double(total)));
    mass = mass < 1 ? 1 : mass;
    return mass > total ? total : mass;
}

// A uniform point in 0..total.
DEVICE uint64_t point_in(uint64_t bits, uint64_t total) { return multiply_high(bits, total); }

// ---- rows

// Whether the row's grammar allows the token.
DEVICE bool is_allowed(const SampleRow& row, const uint32_t* words, uint32_t id) {
    return !(row.flags & ALLOWED) || (words[row.allowed + id / 32] >> id % 32 & 1);
}

// ---- sums over a block of WARPS whole warps

DEVICE uint64_t warp_inclusive(uint64_t x) {
    for (uint32_t delta = 1; delta < WARP; delta *= 2) {
        uint64_t below = shuffle_up(x, delta);
        if (lane() >= delta) x += below;
    }
    return x;
}

// The sum over the threads before this one. Sets `total` to the sum over all threads. Ends with a barrier.
template <uint32_t WARPS>
DEVICE uint64_t block_exclusive(uint64_t x, uint64_t& total, uint64_t (&scratch)[WARPS]) {
    uint64_t inclusive = warp_inclusive(x);
    if (lane() == WARP - 1) scratch[warp()] = inclusive;
    block_barrier();
    uint64_t before = 0;
    total = 0;
    for (uint32_t i = 0; i < WARPS; i++) {
        if (i < warp()) before += scratch[i];
        total += scratch[i];
    }
    block_barrier();
    return before + inclusive - x;
}

template <uint32_t WARPS>
DEVICE uint64_t block_total(uint64_t x, uint64_t (&scratch)[WARPS]) {
    x = warp_sum(x);
    if (lane() == 0) scratch[warp()] = x;
    block_barrier();
    uint64_t total = 0;
    for (uint32_t i = 0; i < WARPS; i++) total += scratch[i];
    block_barrier();
    return total;
}

template <uint32_t WARPS>
DEVICE uint64_t block_largest(uint64_t x, uint64_t (&scratch)[WARPS]) {
    for (uint32_t offset = 16; offset > 0; offset /= 2) x = larger(x, shuffle_xor(x, offset));
    if (lane() == 0) scratch[warp()] = x;
    block_barrier();
    uint64_t best = 0;
    for (uint32_t i = 0; i < WARPS; i++) best = larger(best, scratch[i]);
    block_barrier();
    return best;
}

// Whether this block is the last of `blocks` to arrive here. The last block may read everything that the others wrote before.
// It resets the counter to zero. `flag` is in shared memory.
DEVICE bool arrive_last(uint32_t* counter, uint32_t blocks, uint32_t& flag) {
    block_barrier();
    if (threadIdx.x == 0) {
        global_fence();
        flag = atomic_add(counter, 1u) == blocks - 1;
        if (flag) *counter = 0;
        global_fence();
    }
    block_barrier();
    return flag;
}

// ---- histograms in shared memory: the weight in each of BINS bins, in two words, since native atomic additions in shared
// memory have 32 bits. A carry out of the low word is detected by the thread that causes it.

template <uint32_t BINS>
struct Histogram {
    uint32_t* low;   // [BINS]
    uint32_t* high;  // [BINS]

    DEVICE void clear(uint32_t threads) const {
        for (uint32_t bin = threadIdx.x; bin < BINS; bin += threads) low[bin] = high[bin] = 0;
    }
    DEVICE void add(uint32_t bin, uint64_t weight) const {
        uint32_t part = uint32_t(weight);
        uint32_t before = atomic_add(low + bin, part);
        uint32_t rest = uint32_t(weight >> 32) + (before + part < before ? 1 : 0);
        if (rest != 0) atomic_add(high + bin, rest);
    }
    DEVICE uint64_t weight(uint32_t bin) const { return uint64_t(high[bin]) << 32 | low[bin]; }
};

struct Found {
    uint32_t bin;
    uint64_t before;  // the total weight of the bins before
};

// Finds the first bin at which the weights, summed from bin 0 on, reach `target`; NONE if the total does not. `found` is in
// shared memory and may be read by every thread on return. The caller must have passed a barrier since the last addition.
template <uint32_t BINS, uint32_t WARPS>
DEVICE void first_reaching(const Histogram<BINS>& histogram, uint64_t target, uint64_t (&scratch)[WARPS], Found& found) {
    constexpr uint32_t OWN = BINS / (WARPS * WARP);
    static_assert(OWN * WARPS * WARP == BINS, "every thread takes as many bins");
    uint32_t first = threadIdx.x * OWN;
    uint64_t own = 0, total;
    for (uint32_t i = 0; i < OWN; i++) own += histogram.weight(first + i);
    if (threadIdx.x == 0) found.bin = NONE;
    uint64_t before = block_exclusive<WARPS>(own, total, scratch);
    if (before < target && target <= before + own) {
        uint32_t bin = first;
        while (before + histogram.weight(bin) < target) before += histogram.weight(bin++);
        found.bin = bin;
        found.before = before;
    }
    block_barrier();
}
