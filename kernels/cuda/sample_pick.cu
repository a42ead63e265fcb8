// Sampling, the part for truncated rows: top-k, min-p and top-p among the candidates, and the draw. One block for each row.
//
// Up to LISTED candidates are sorted in shared memory. A row with more candidates (nearly flat, or a huge top_k) is searched
// without a list: a radix search finds the item at which a sum over all tokens reaches its target, with 512 bins per pass,
// until the remaining items can be sorted. Both ways give the same token.
#include "sample.cuh"

constexpr uint32_t BINS = 512;
constexpr uint32_t BIN_BITS = 9;

struct PickShared {
    uint64_t* items;  // [LISTED]
    Histogram<BINS> weights, counts;
    uint64_t (&scratch)[PICK_WARPS];
    Found& found;
    uint32_t& count;
};

// ---- lists in shared memory

// Sorts the first `len` items (bitonic; Batcher 1968). Pads them with NO_ITEM to a power of two, which is returned.
DEVICE uint32_t sort_items(uint64_t* items, uint32_t len) {
    uint32_t size = 2;
    while (size < len) size *= 2;
    for (uint32_t i = len + threadIdx.x; i < size; i += PICK_THREADS) items[i] = NO_ITEM;
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            block_barrier();
            for (uint32_t pair = threadIdx.x; pair < size / 2; pair += PICK_THREADS) {
                uint32_t low = (pair & ~(step - 1)) * 2 + (pair & (step - 1));
                uint64_t a = items[low], b = items[low + step];
                bool ascends = (low & run) == 0;
                if ((a > b) == ascends) {
                    items[low] = b;
                    items[low + step] = a;
                }
            }
        }
    }
    block_barrier();
    return size;
}

// Finds the index of the first of the sorted items at which the weights, summed in order, reach `target`, and the sum before
// it. Each thread sums consecutive items. The total must reach `target`.
template <typename Weight>
DEVICE Found item_reaching(PickShared& shared, uint32_t len, uint64_t target, Weight weight) {
    uint32_t each = (len + PICK_THREADS - 1) / PICK_THREADS, first = threadIdx.x * each;
    uint32_t end = first + each < len ? first + each : len;
    uint64_t own = 0, total;
    for (uint32_t i = first; i < end; i++) own += weight(shared.items[i]);
    uint64_t before = block_exclusive<PICK_WARPS>(own, total, shared.scratch);
    if (before < target && target <= before + own) {
        uint32_t i = first;
        for (uint64_t w = weight(shared.items[i]); before + w < target; w = weight(shared.items[i])) {
            before += w;
            i++;
        }
        shared.found = Found{i, before};
    }
    block_barrier();
    Found found = shared.found;
    block_barrier();
    return found;
}

DEVICE uint64_t listed_mass(uint64_t item) { return item == NO_ITEM ? 0 : candidate_mass(item); }

// The token of a row whose candidates are all listed.
DEVICE uint32_t pick_listed(const SampleParams& p, const SampleRow& sample, const SampleState& state, PickShared& shared) {
    const uint64_t* list = p.list + size_t(blockIdx.y) * LISTED;
    const float* row = p.logits + size_t(blockIdx.y) * p.vocab;
    uint64_t* items = shared.items;
    uint32_t len = state.listed;
    for (uint32_t i = threadIdx.x; i < len; i += PICK_THREADS) items[i] = list[i];
    if (sample.top_k != 0) {
        sort_items(items, len);
        len = sample.top_k < len ? sample.top_k : len;
        for (uint32_t i = threadIdx.x; i < len; i += PICK_THREADS) {
            uint32_t id = uint32_t(items[i]) & ID_MASK;
            // A token that is not allowed has the key of -inf, whatever its logit.
            bool is_out = uint32_t(items[i] >> ID_BITS) == ~KEY_OF_NEGATIVE_INFINITY;
            uint64_t mass = is_out ? 0 : mass_of(row[id], state.max, sample.scale);
            items[i] = mass >= sample.min_mass ? candidate(mass, id) : NO_ITEM;
        }
    }
    block_barrier();
    uint64_t own = 0;
    for (uint32_t i = threadIdx.x; i < len; i += PICK_THREADS) own += listed_mass(items[i]);
    uint64_t total = block_total<PICK_WARPS>(own, shared.scratch);
    if (sample.top_p < 1.0f) {
        // If top_p is the only limit, the nucleus is a share of the whole row's mass.
        if (sample.flags & NUCLEUS) total = state.total;
        sort_items(items, len);
        len = item_reaching(shared, len, nucleus_mass(sample.top_p, total), listed_mass).bin + 1;
        own = 0;
        for (uint32_t i = threadIdx.x; i < len; i += PICK_THREADS) own += listed_mass(items[i]);
        total = block_total<PICK_WARPS>(own, shared.scratch);
    }
    // Repacks the items with the id first, for the draw. No id has all bits set, so NO_ITEM stays last.
    for (uint32_t i = threadIdx.x; i < len; i += PICK_THREADS) {
        uint64_t item = items[i];
        if (item != NO_ITEM) items[i] = (item & ID_MASK) << (64 - ID_BITS) | (candidate_mass(item) - 1);
    }
    sort_items(items, len);
    auto mass = [](uint64_t item) -> uint64_t { return item == NO_ITEM ? 0 : (item & (UNIT - 1)) + 1; };
    Found found = item_reaching(shared, len, point_in(sample.bits, total) + 1, mass);
    return uint32_t(items[found.bin] >> (64 - ID_BITS));
}

// ---- whole rows

// A row's tokens, filtered by the limits found so far.
struct Tokens {
    const SampleParams& p;
    const SampleRow& sample;
    const SampleState& state;
    const float* row;
    const uint32_t* words;
    uint64_t last_key;        // the last key in the top k
    uint64_t last_candidate;  // the last candidate in the nucleus

    DEVICE float logit(uint32_t id) const { return is_allowed(sample, words, id) ? row[id] : -INFINITE; }
    DEVICE uint64_t key(uint32_t id) const { return uint64_t(~ascending(logit(id))) << ID_BITS | id; }
    // The token's mass; 0 for tokens that are filtered out.
    DEVICE uint64_t mass(uint32_t id) const {
        float own = logit(id);
        uint64_t mass = mass_of(own, state.max, sample.scale);
        if (mass < sample.min_mass || (uint64_t(~ascending(own)) << ID_BITS | id) > last_key) return 0;
        return candidate(mass, id) > last_candidate ? 0 : mass;
    }
};

struct ByKey {
    const Tokens& tokens;
    DEVICE uint64_t weight(uint32_t) const { return 1; }
    DEVICE uint64_t item(uint32_t id, uint64_t) const { return tokens.key(id); }
    DEVICE uint64_t weight_of(uint64_t item) const { return item == NO_ITEM ? 0 : 1; }
};
struct ByMass {
    const Tokens& tokens;
    DEVICE uint64_t weight(uint32_t id) const { return tokens.mass(id); }
    DEVICE uint64_t item(uint32_t id, uint64_t weight) const { return candidate(weight, id); }
    DEVICE uint64_t weight_of(uint64_t item) const { return listed_mass(item); }
};

DEVICE uint32_t bit_length(uint64_t x) { return x == 0 ? 0 : 64 - leading_zeros(x); }

// Adds to a bin. If all lanes of the warp have the same bin, the warp sums first, so that the lanes do not serialize.
DEVICE void add_together(const PickShared& shared, bool is_in, uint32_t bin, uint64_t weight) {
    uint32_t lanes = votes(is_in);
    if (lanes == 0) return;
    uint32_t leader = shuffle(bin, trailing_zeros(lanes));
    if (votes(is_in && bin == leader) == lanes) {
        uint64_t sum = warp_sum(is_in ? weight : uint64_t(0));
        if (lane() != 0) return;
        shared.weights.add(leader, sum);
        shared.counts.add(leader, count_ones(lanes));
    } else if (is_in) {
        shared.weights.add(bin, weight);
        shared.counts.add(bin, 1);
    }
}

// Finds the item at which the weights of the row's items, summed in ascending order of items, reach `target`. The total must
// reach `target`.
template <typename Order>
DEVICE uint64_t item_in_row(PickShared& shared, uint32_t vocab, uint64_t target, const Order& order) {
    uint64_t low = 0, high = NO_ITEM, before = 0;
    uint32_t padded = (vocab + PICK_THREADS - 1) / PICK_THREADS * PICK_THREADS;
    for (;;) {
        uint32_t length = bit_length(high - low), shift = length > BIN_BITS ? length - BIN_BITS : 0;
        shared.weights.clear(PICK_THREADS);
        shared.counts.clear(PICK_THREADS);
        block_barrier();
        for (uint32_t id = threadIdx.x; id < padded; id += PICK_THREADS) {
            uint64_t weight = id < vocab ? order.weight(id) : 0;
            uint64_t item = weight != 0 ? order.item(id, weight) : 0;
            bool is_in = weight != 0 && low <= item && item <= high;
            add_together(shared, is_in, uint32_t((item - low) >> shift), weight);
        }
        block_barrier();
        first_reaching<BINS>(shared.weights, target - before, shared.scratch, shared.found);
        Found found = shared.found;
        bool fits = shared.counts.weight(found.bin) <= LISTED;
        before += found.before;
        low += uint64_t(found.bin) << shift;
        uint64_t end = low + (uint64_t(1) << shift) - 1;
        high = end < high ? end : high;
        block_barrier();
        if (fits) break;
    }
    if (threadIdx.x == 0) shared.count = 0;
    block_barrier();
    for (uint32_t id = threadIdx.x; id < vocab; id += PICK_THREADS) {
        uint64_t weight = order.weight(id);
        if (weight == 0) continue;
        uint64_t item = order.item(id, weight);
        if (low <= item && item <= high) shared.items[atomic_add(&shared.count, 1u)] = item;
    }
    block_barrier();
    uint32_t len = shared.count;
    sort_items(shared.items, len);
    Found found = item_reaching(shared, len, target - before, [&](uint64_t item) { return order.weight_of(item); });
    return shared.items[found.bin];
}

// The mass of the warp's tokens, ids `first` to `end`. All lanes get the result.
DEVICE uint64_t warp_mass(const Tokens& tokens, uint32_t first, uint32_t end) {
    uint64_t sum = 0;
    for (uint32_t id = first + lane(); id < end; id += WARP) sum += tokens.mass(id);
    return warp_sum(sum);
}

// The token of a row whose candidates are too many to list.
DEVICE uint32_t pick_in_row(Tokens& tokens, PickShared& shared) {
    uint32_t vocab = tokens.p.vocab;
    const SampleRow& sample = tokens.sample;
    if (sample.top_k != 0) tokens.last_key = item_in_row(shared, vocab, sample.top_k, ByKey{tokens});

    uint32_t each = (vocab + PICK_THREADS - 1) / PICK_THREADS * WARP;
    uint32_t first = warp() * each < vocab ? warp() * each : vocab;
    uint32_t end = first + each < vocab ? first + each : vocab;
    uint64_t total, own = warp_mass(tokens, first, end);
    block_exclusive<PICK_WARPS>(lane() == 0 ? own : 0, total, shared.scratch);
    if (sample.top_p < 1.0f) {
        tokens.last_candidate = item_in_row(shared, vocab, nucleus_mass(sample.top_p, total), ByMass{tokens});
        own = warp_mass(tokens, first, end);
        block_exclusive<PICK_WARPS>(lane() == 0 ? own : 0, total, shared.scratch);
    }
    uint64_t unused, before = block_exclusive<PICK_WARPS>(lane() == 0 ? own : 0, unused, shared.scratch);
    before = shuffle(before, 0);
    uint64_t point = point_in(sample.bits, total);
    if (before <= point && point - before < own) {
        uint64_t left = point - before;
        for (uint32_t base = first;; base += WARP) {
            uint64_t mass = base + lane() < end ? tokens.mass(base + lane()) : 0;
            uint64_t inclusive = warp_inclusive(mass);
            uint32_t beyond = votes(left < inclusive);
            if (beyond != 0) {
                if (lane() == 0) shared.found.bin = base + trailing_zeros(beyond);
                break;
            }
            left -= shuffle(inclusive, WARP - 1);
        }
    }
    block_barrier();
    return shared.found.bin;
}

KERNEL(sample_pick, SampleParams, PICK_THREADS) {
    SHARED(uint64_t, items, [LISTED]);
    SHARED(uint32_t, bins, [4 * BINS]);
    SHARED(uint64_t, scratch, [PICK_WARPS]);
    SHARED(Found, found, );
    SHARED(uint32_t, count, );
    grid_dependency_launch();
    grid_dependency_wait();
    const SampleRow& sample = p.rows[blockIdx.y];
    const SampleState& state = p.states[blockIdx.y];
    if (!(sample.flags & (GATHER | NUCLEUS)) || !state.is_valid) return;
    PickShared shared{items, {bins, bins + BINS}, {bins + 2 * BINS, bins + 3 * BINS}, scratch, found, count};
    uint32_t token;
    if (state.listed <= LISTED) {
        token = pick_listed(p, sample, state, shared);
    } else {
        const float* row = p.logits + size_t(blockIdx.y) * p.vocab;
        Tokens tokens{p, sample, state, row, p.header->words, NO_ITEM, NO_ITEM};
        token = pick_in_row(tokens, shared);
    }
    if (threadIdx.x == 0) {
        p.sampled[p.header->turn * p.max_rows + blockIdx.y] = token;
        p.results[blockIdx.y].token = token;
    }
}
