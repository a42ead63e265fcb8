// Sampling, the part for log-probabilities. Computes from the raw logits: the row's mass at temperature 1, the sampled token's
// rank, and the best tokens.
#include "sample.cuh"

// Restores the raw logits of the tokens in a list with an entry every `stride` words. Sets `own` if the sampled token is among
// them.
DEVICE void restore(const SampleHeader& header, uint32_t list, uint32_t num, uint32_t stride, uint32_t first, uint32_t len,
                    uint32_t token, uint32_t* logits, uint32_t& own) {
    for (uint32_t i = threadIdx.x; i < num; i += SLICE_THREADS) {
        uint32_t at = list + i * stride, id = header.words[at];
        uint32_t raw = float_as_uint(header.saved[at]);
        // If several lists contain a token, they have saved the same logit.
        if (id - first < len) logits[id - first] = raw;
        if (id == token) own = raw;
    }
}

// The best `num` tokens of the slice, best first, then zeros. Every thread searches its own tokens.
DEVICE void slice_best(const uint32_t* logits, uint32_t first, uint32_t len, uint32_t num, uint64_t* tops,
                       uint64_t (&scratch)[SLICE_WARPS]) {
    uint32_t taken = 0;
    uint64_t own = 0;
    uint32_t own_place = 0;
    auto look = [&]() {
        own = 0;
        UNROLL
        for (uint32_t i = 0; i < PER_THREAD; i++) {
            uint32_t at = i * SLICE_THREADS + threadIdx.x;
            if (at >= len || (taken >> i & 1)) continue;
            uint64_t item = better_first(ascending(uint_as_float(logits[at])), first + at);
            if (item > own) {
                own = item;
                own_place = i;
            }
        }
    };
    look();
    for (uint32_t n = 0; n < num; n++) {
        uint64_t best = block_largest<SLICE_WARPS>(own, scratch);
        if (threadIdx.x == 0) tops[n] = best;
        if (best != 0 && best == own) {
            taken |= 1u << own_place;
            look();
        }
    }
}

// Called by the last block: merges the slices' best tokens, with one thread for each slice.
DEVICE void row_best(const SampleParams& p, uint32_t num, uint64_t (&scratch)[SLICE_WARPS]) {
    const uint64_t* tops = p.slice_tops + (size_t(blockIdx.y) * p.slices + threadIdx.x) * p.max_logprobs;
    uint32_t next = 0;
    auto head = [&]() -> uint64_t { return threadIdx.x < p.slices && next < num ? tops[next] : 0; };
    uint64_t own = head();
    for (uint32_t n = 0; n < num; n++) {
        uint64_t best = block_largest<SLICE_WARPS>(own, scratch);
        if (threadIdx.x == 0) {
            p.tops[size_t(blockIdx.y) * p.max_logprobs + n] = SampleTop{~uint32_t(best), from_ascending(uint32_t(best >> 32))};
        }
        if (best != 0 && best == own) {
            next++;
            own = head();
        }
    }
}

KERNEL(sample_logprobs, SampleParams, SLICE_THREADS) {
    SHARED(uint32_t, logits, [SLICE]);
    SHARED(uint64_t, scratch, [SLICE_WARPS]);
    SHARED(uint32_t, flag, );
    SHARED(uint32_t, own, );
    grid_dependency_launch();
    grid_dependency_wait();
    const SampleRow& sample = p.rows[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    if (!(sample.flags & LOGPROBS) || !state.is_valid) return;
    const SampleHeader& header = *p.header;
    const float* row = p.logits + size_t(blockIdx.y) * p.vocab;
    uint32_t first = blockIdx.x * SLICE, len = p.vocab - first < SLICE ? p.vocab - first : SLICE;
    uint32_t token = p.sampled[header.turn * p.max_rows + blockIdx.y];

    for (uint32_t at = threadIdx.x; at < len; at += SLICE_THREADS) logits[at] = float_as_uint(row[first + at]);
    if (threadIdx.x == 0) own = float_as_uint(row[token]);
    block_barrier();
    restore(header, sample.bias, sample.num_bias, 2, first, len, token, logits, own);
    restore(header, sample.barred, sample.num_barred, 1, first, len, token, logits, own);
    if (sample.flags & PENALTIES) {
        restore(header, sample.occurrences, sample.num_occurrences, 2, first, len, token, logits, own);
        if (sample.pending != NONE && threadIdx.x == 0) {
            uint32_t pending = p.sampled[sample.pending];
            if (pending - first < len) logits[pending - first] = float_as_uint(state.pending_raw);
            if (pending == token) own = float_as_uint(state.pending_raw);
        }
    }
    block_barrier();

    float own_logit = uint_as_float(own);
    uint64_t sum = 0;
    uint32_t ahead = 0;
    for (uint32_t at = threadIdx.x; at < len; at += SLICE_THREADS) {
        float logit = uint_as_float(logits[at]);
        sum += mass_of(logit, state.raw_max, 1.0f);
        if (logit > own_logit || (logit == own_logit && first + at < token)) ahead++;
    }
    sum = block_total<SLICE_WARPS>(sum, scratch);
    uint64_t block_ahead = block_total<SLICE_WARPS>(ahead, scratch);
    size_t slice = size_t(blockIdx.y) * p.slices + blockIdx.x;
    if (threadIdx.x == 0) {
        p.slice_sums[slice] = sum;
        p.slice_counts[slice] = uint32_t(block_ahead);
    }
    slice_best(logits, first, len, sample.num_logprobs, p.slice_tops + slice * p.max_logprobs, scratch);
    if (!arrive_last(&state.arrived[2], p.slices, flag)) return;

    slice = size_t(blockIdx.y) * p.slices + threadIdx.x;
    uint64_t total = block_total<SLICE_WARPS>(threadIdx.x < p.slices ? p.slice_sums[slice] : 0, scratch);
    uint64_t rank = block_total<SLICE_WARPS>(threadIdx.x < p.slices ? p.slice_counts[slice] : 0, scratch) + 1;
    if (threadIdx.x == 0) {
        SampleResult& result = p.results[blockIdx.y];
        result.rank = uint32_t(rank);
        result.raw = own_logit;
        result.total_low = uint32_t(total);
        result.total_high = uint32_t(total >> 32);
    }
    row_best(p, sample.num_logprobs, scratch);
}
