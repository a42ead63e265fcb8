// Sampling, the part that runs on all slices of a row: changes and the maximum (sample_scan), masses and the draw of rows that
// are not truncated (sample_masses), and the candidates of truncated rows (sample_masses, sample_nucleus). sample_pick.cu
// then chooses among the candidates.
#include "sample.cuh"

// ---- changes: bias, barred tokens, penalties, in the order of sample/change.rs

// A block's slice of a row while it is changed, in shared memory as words.
struct ChangedSlice {
    uint32_t* logits;  // [SLICE]
    float* row;        // the row in device memory
    uint32_t first, len;
    const uint32_t* words;
    float* saved;

    DEVICE bool holds(uint32_t token) const { return token - first < len; }

    // A result that is too large for f32 becomes the largest f32. A NaN (only from parameters that are not numbers) becomes
    // -inf.
    DEVICE void set(uint32_t token, float changed) const {
        float logit = changed != changed ? -INFINITE : changed;
        logit = logit > 3.402823466e38f ? 3.402823466e38f : logit;
        logits[token - first] = float_as_uint(logit);
        row[token] = logit;
    }
    DEVICE float get(uint32_t token) const { return uint_as_float(logits[token - first]); }

    // Saves the raw logits of the tokens in a list with an entry every `stride` words.
    DEVICE void save(uint32_t list, uint32_t num, uint32_t stride) const {
        for (uint32_t i = threadIdx.x; i < num; i += SLICE_THREADS) {
            uint32_t at = list + i * stride;
            if (holds(words[at])) saved[at] = get(words[at]);
        }
    }

    DEVICE void penalise(const SampleRow& sample, uint32_t token, uint32_t count) const {
        float logit = get(token);
        logit = logit > 0.0f ? divide(logit, sample.repetition) : logit * sample.repetition;
        if (count != 0) logit = logit - sample.frequency * float(count) - sample.presence;
        set(token, logit);
    }
};

// Applies the penalties. The token `pending` counts as emitted once more. `is_listed` is in shared memory.
DEVICE void apply_penalties(const ChangedSlice& slice, const SampleRow& sample, uint32_t pending, uint32_t& is_listed) {
    if (threadIdx.x == 0) is_listed = 0;
    block_barrier();
    for (uint32_t i = threadIdx.x; i < sample.num_occurrences; i += SLICE_THREADS) {
        uint32_t at = sample.occurrences + 2 * i;
        uint32_t token = slice.words[at];
        uint32_t count = slice.words[at + 1];
        if (token == pending) {
            is_listed = 1;
            if (count != NONE) count++;
        }
        if (slice.holds(token)) slice.penalise(sample, token, count);
    }
    block_barrier();
    if (threadIdx.x == 0 && !is_listed && slice.holds(pending)) slice.penalise(sample, pending, 1);
}

DEVICE void apply_changes(const ChangedSlice& slice, const SampleRow& sample, SampleState& state, uint32_t pending,
                          uint32_t& is_listed) {
    if (sample.flags & LOGPROBS) {
        slice.save(sample.bias, sample.num_bias, 2);
        slice.save(sample.barred, sample.num_barred, 1);
        slice.save(sample.occurrences, sample.num_occurrences, 2);
        if (threadIdx.x == 0 && slice.holds(pending)) state.pending_raw = slice.get(pending);
        block_barrier();
    }
    for (uint32_t i = threadIdx.x; i < sample.num_bias; i += SLICE_THREADS) {
        uint32_t token = slice.words[sample.bias + 2 * i];
        if (slice.holds(token)) slice.set(token, slice.get(token) + uint_as_float(slice.words[sample.bias + 2 * i + 1]));
    }
    block_barrier();
    for (uint32_t i = threadIdx.x; i < sample.num_barred; i += SLICE_THREADS) {
        uint32_t token = slice.words[sample.barred + i];
        if (slice.holds(token)) slice.set(token, -INFINITE);
    }
    block_barrier();
    if (sample.flags & PENALTIES) apply_penalties(slice, sample, pending, is_listed);
    block_barrier();
}

// ---- maximum

// The bucket of a logit's distance below the maximum. There are eight buckets for each octave, so that small distances are
// resolved finely.
constexpr uint32_t DISTANCE_BUCKETS = 2048;
DEVICE uint32_t distance_bucket(float max, float logit) { return float_as_uint(max - logit) >> 20; }

// Called by the last block: finds how far below the maximum the top k can reach. The k best group maxima are k tokens, so a
// token below all of them is not in the top k. `space` is shared memory for the histogram.
DEVICE void bound_top_k(const SampleParams& p, const SampleRow& sample, SampleState& state, uint32_t* space,
                        uint64_t (&scratch)[SLICE_WARPS], Found& found) {
    Histogram<DISTANCE_BUCKETS> histogram{space, space + DISTANCE_BUCKETS};
    histogram.clear(SLICE_THREADS);
    block_barrier();
    const uint32_t* groups = p.groups + size_t(blockIdx.y) * p.slices * SLICE_THREADS;
    for (uint32_t i = threadIdx.x; i < p.slices * SLICE_THREADS; i += SLICE_THREADS) {
        if (groups[i] != 0) histogram.add(distance_bucket(state.max, from_ascending(groups[i])), 1);
    }
    block_barrier();
    first_reaching<DISTANCE_BUCKETS>(histogram, sample.top_k, scratch, found);
    if (threadIdx.x == 0) state.bound_distance = found.bin;
}

// Called by the last block: finds the maxima of the row, whether it is valid, and the token if it is greedy.
DEVICE void finish_scan(const SampleParams& p, SampleState& state, uint32_t turn,
                        uint64_t (&scratch)[SLICE_WARPS]) {
    size_t slice = size_t(blockIdx.y) * p.slices + threadIdx.x;
    bool has_slice = threadIdx.x < p.slices;
    uint32_t raw_key = uint32_t(block_largest<SLICE_WARPS>(has_slice ? p.slice_counts[slice] : 0, scratch));
    uint64_t best = block_largest<SLICE_WARPS>(has_slice ? p.slice_sums[slice] : 0, scratch);
    if (threadIdx.x == 0) {
        uint32_t key = uint32_t(best >> 32);
        bool is_valid = raw_key != POISON && raw_key > KEY_OF_NEGATIVE_INFINITY && key > KEY_OF_NEGATIVE_INFINITY;
        state.is_valid = is_valid;
        state.max = from_ascending(key);
        state.raw_max = from_ascending(raw_key);
        state.listed = 0;
        // A later draw overwrites the token. An invalid row gets a token that the next step can embed.
        uint32_t token = is_valid ? ~uint32_t(best) : 0;
        p.sampled[turn * p.max_rows + blockIdx.y] = token;
        p.results[blockIdx.y] = SampleResult{token, is_valid, 0, 0.0f, state.raw_max, 0, 0, 0};
    }
    block_barrier();
}

KERNEL(sample_scan, SampleParams, SLICE_THREADS) {
    SHARED(uint32_t, logits, [SLICE]);
    SHARED(uint64_t, scratch, [SLICE_WARPS]);
    SHARED(Found, found, );
    SHARED(uint32_t, flag, );
    static_assert(2 * DISTANCE_BUCKETS <= SLICE, "the histogram takes the place of the slice");
    grid_dependency_launch();
    grid_dependency_wait();
    const SampleRow& sample = p.rows[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    const uint32_t* words = p.header->words;
    uint32_t turn = p.header->turn;
    float* row = p.logits + size_t(blockIdx.y) * p.vocab;
    uint32_t first = blockIdx.x * SLICE, len = p.vocab - first < SLICE ? p.vocab - first : SLICE;

    uint32_t raw_key = 0;
    UNROLL
    for (uint32_t i = 0; i < PER_THREAD; i++) {
        uint32_t at = i * SLICE_THREADS + threadIdx.x;
        if (at >= len) continue;
        float logit = row[first + at];
        logits[at] = float_as_uint(logit);
        uint32_t key = logit < INFINITE ? ascending(logit) : POISON;
        raw_key = key > raw_key ? key : raw_key;
    }
    if (sample.num_bias + sample.num_barred + (sample.flags & PENALTIES) != 0) {
        uint32_t pending = sample.pending == NONE ? NONE : p.sampled[sample.pending];
        block_barrier();
        apply_changes(ChangedSlice{logits, row, first, len, words, p.header->saved}, sample, state, pending, flag);
    }

    uint64_t best = 0;
    UNROLL
    for (uint32_t i = 0; i < PER_THREAD; i++) {
        uint32_t at = i * SLICE_THREADS + threadIdx.x;
        if (at >= len) continue;
        float logit = is_allowed(sample, words, first + at) ? uint_as_float(logits[at]) : -INFINITE;
        best = larger(best, better_first(ascending(logit), first + at));
    }
    size_t slice = size_t(blockIdx.y) * p.slices + blockIdx.x;
    if (sample.top_k != 0 || sample.flags & NUCLEUS) p.groups[slice * SLICE_THREADS + threadIdx.x] = uint32_t(best >> 32);
    raw_key = uint32_t(block_largest<SLICE_WARPS>(raw_key, scratch));
    best = block_largest<SLICE_WARPS>(best, scratch);
    if (threadIdx.x == 0) {
        p.slice_counts[slice] = raw_key;
        p.slice_sums[slice] = best;
    }
    if (!arrive_last(&state.arrived[0], p.slices, flag)) return;
    finish_scan(p, state, turn, scratch);
    if (sample.top_k != 0 && state.is_valid) bound_top_k(p, sample, state, logits, scratch, found);
}

// ---- candidates

// Calls visit(index, id, logit) for each of the thread's tokens in its slice.
template <typename Visit>
DEVICE void for_own_tokens(const SampleParams& p, const SampleRow& sample, const uint32_t* words, Visit visit) {
    const float* row = p.logits + size_t(blockIdx.y) * p.vocab;
    UNROLL
    for (uint32_t i = 0; i < PER_THREAD; i++) {
        uint32_t id = blockIdx.x * SLICE + i * SLICE_THREADS + threadIdx.x;
        if (id < p.vocab) visit(i, id, is_allowed(sample, words, id) ? row[id] : -INFINITE);
    }
}

// Adds the slice's candidates to the row's list, in no particular order: tokens with at least `bound_mass`, or near enough for
// the top k. For a top k, the list contains keys, since it is chosen by logit; otherwise it contains masses.
DEVICE void gather(const SampleParams& p, const SampleRow& sample, SampleState& state, uint64_t bound_mass,
                   uint32_t& count, uint32_t& base) {
    if (threadIdx.x == 0) count = 0;
    block_barrier();
    uint64_t items[PER_THREAD];
    uint32_t is_item = 0;
    for_own_tokens(p, sample, p.header->words, [&](uint32_t i, uint32_t id, float logit) {
        bool wanted;
        if (sample.top_k != 0) {
            wanted = distance_bucket(state.max, logit) <= state.bound_distance;
            items[i] = uint64_t(~ascending(logit)) << ID_BITS | id;
        } else {
            uint64_t mass = mass_of(logit, state.max, sample.scale);
            wanted = mass >= bound_mass;
            items[i] = candidate(mass, id);
        }
        if (wanted) is_item |= 1u << i;
    });
    uint32_t at = is_item != 0 ? atomic_add(&count, count_ones(is_item)) : 0;
    block_barrier();
    if (threadIdx.x == 0 && count != 0) base = atomic_add(&state.listed, count);
    block_barrier();
    uint64_t* list = p.list + size_t(blockIdx.y) * LISTED;
    at += base;
    UNROLL
    for (uint32_t i = 0; i < PER_THREAD; i++) {
        if (!(is_item >> i & 1)) continue;
        if (at < LISTED) list[at] = items[i];
        at++;
    }
}

// ---- masses

// Buckets of masses, eight for each octave, the largest masses first.
constexpr uint32_t MASS_BUCKETS = 512;
constexpr uint32_t LARGEST_BUCKET = 44 * 8;
DEVICE uint32_t mass_bucket(uint64_t mass) {
    uint32_t octave = 63 - leading_zeros(mass);
    return LARGEST_BUCKET - (octave * 8 + (uint32_t(mass << (63 - octave) >> 60) & 7));
}
DEVICE uint64_t least_mass_in(uint32_t bucket) {
    uint32_t place = LARGEST_BUCKET - bucket;
    return uint64_t(8 + place % 8) << (place / 8) >> 3;
}

// Called by the last block: finds a lower bound for the mass of the nucleus' tokens. If the group maxima with at least a
// certain mass already reach the nucleus' share, so do all tokens with at least that mass. If the group maxima do not reach
// it, a token is dropped only if all tokens that are as small have less than the tail's share.
DEVICE void bound_nucleus(const SampleParams& p, const SampleRow& sample, SampleState& state, uint64_t total,
                          uint32_t (&space)[2 * MASS_BUCKETS], uint64_t (&scratch)[SLICE_WARPS], Found& found) {
    Histogram<MASS_BUCKETS> histogram{space, space + MASS_BUCKETS};
    histogram.clear(SLICE_THREADS);
    block_barrier();
    const uint32_t* groups = p.groups + size_t(blockIdx.y) * p.slices * SLICE_THREADS;
    for (uint32_t i = threadIdx.x; i < p.slices * SLICE_THREADS; i += SLICE_THREADS) {
        if (groups[i] == 0) continue;
        uint64_t mass = mass_of(from_ascending(groups[i]), state.max, sample.scale);
        if (mass != 0) histogram.add(mass_bucket(mass), mass);
    }
    block_barrier();
    uint64_t target = nucleus_mass(sample.top_p, total);
    first_reaching<MASS_BUCKETS>(histogram, target, scratch, found);
    if (threadIdx.x == 0) {
        state.total = total;
        state.bound_mass = found.bin != NONE ? least_mass_in(found.bin) : (total - target) / p.vocab + 1;
    }
}

// Called by the last block: draws the token at a point of the row's mass, in the order of ids. First finds the slice; then each
// thread searches sixteen consecutive ids.
DEVICE void draw(const SampleParams& p, const SampleRow& sample, const SampleState& state,
                 uint64_t (&scratch)[SLICE_WARPS], Found& found) {
    uint64_t sum = threadIdx.x < p.slices ? p.slice_sums[size_t(blockIdx.y) * p.slices + threadIdx.x] : 0;
    uint64_t total;
    uint64_t before = block_exclusive<SLICE_WARPS>(sum, total, scratch);
    uint64_t point = point_in(sample.bits, total);
    if (before <= point && point - before < sum) found = Found{threadIdx.x, before};
    block_barrier();
    uint64_t left = point - found.before;
    uint32_t first = found.bin * SLICE + threadIdx.x * PER_THREAD;

    const float* row = p.logits + size_t(blockIdx.y) * p.vocab;
    const uint32_t* words = p.header->words;
    auto mass_at = [&](uint32_t id) -> uint64_t {
        if (id >= p.vocab || !is_allowed(sample, words, id)) return 0;
        return mass_of(row[id], state.max, sample.scale);
    };
    uint64_t own = 0, slice_total;
    for (uint32_t i = 0; i < PER_THREAD; i++) own += mass_at(first + i);
    before = block_exclusive<SLICE_WARPS>(own, slice_total, scratch);
    if (before <= left && left - before < own) {
        left -= before;
        uint32_t id = first;
        for (uint64_t mass = mass_at(id); left >= mass; mass = mass_at(id)) {
            left -= mass;
            id++;
        }
        p.sampled[p.header->turn * p.max_rows + blockIdx.y] = id;
        p.results[blockIdx.y].token = id;
    }
}

KERNEL(sample_masses, SampleParams, SLICE_THREADS) {
    SHARED(uint32_t, space, [2 * MASS_BUCKETS]);
    SHARED(uint64_t, scratch, [SLICE_WARPS]);
    SHARED(Found, found, );
    SHARED(uint32_t, flag, );
    SHARED(uint32_t, base, );
    grid_dependency_launch();
    grid_dependency_wait();
    const SampleRow& sample = p.rows[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    if (!(sample.flags & DRAW) || !state.is_valid) return;
    if (sample.flags & GATHER) {
        gather(p, sample, state, sample.min_mass, flag, base);
        return;
    }
    uint64_t sum = 0;
    for_own_tokens(p, sample, p.header->words, [&](uint32_t, uint32_t, float logit) {
        sum += mass_of(logit, state.max, sample.scale);
    });
    sum = block_total<SLICE_WARPS>(sum, scratch);
    if (threadIdx.x == 0) p.slice_sums[size_t(blockIdx.y) * p.slices + blockIdx.x] = sum;
    if (!arrive_last(&state.arrived[1], p.slices, flag)) return;
    if (sample.flags & NUCLEUS) {
        uint64_t own = threadIdx.x < p.slices ? p.slice_sums[size_t(blockIdx.y) * p.slices + threadIdx.x] : 0;
        bound_nucleus(p, sample, state, block_total<SLICE_WARPS>(own, scratch), space, scratch, found);
    } else {
        draw(p, sample, state, scratch, found);
    }
}

KERNEL(sample_nucleus, SampleParams, SLICE_THREADS) {
    SHARED(uint32_t, count, );
    SHARED(uint32_t, base, );
    grid_dependency_launch();
    grid_dependency_wait();
    const SampleRow& sample = p.rows[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    if (!(sample.flags & NUCLEUS) || !state.is_valid) return;
    gather(p, sample, state, state.bound_mass, count, base);
}
