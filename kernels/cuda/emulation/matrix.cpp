// Computes the products of the matrix instructions.
#include "../prelude.cuh"

namespace emulation {
namespace {

constexpr uint32_t M = 16, N = 8;

// Element `index` of a word with PER_WORD elements.
template <typename T, uint32_t PER_WORD>
T element(uint32_t word, uint32_t index) {
    T value;
    word >>= 32 / PER_WORD * index;
    memcpy(&value, &word, sizeof value);
    return value;
}

double wide(bf16 x) { return widen(x); }
double wide(f16 x) { return widen(x); }
double wide(fp8 x) { return widen(x); }
int32_t wide(int8_t x) { return x; }

float rounded(float, double sum) { return float(sum); }
// Wraps, as the instruction does without saturation.
int32_t rounded(int32_t, int64_t sum) { return int32_t(uint32_t(uint64_t(sum))); }

// c += a · b for elements of type T, with PER_WORD elements in a word. K is the number of elements in 8 words.
template <typename T, uint32_t PER_WORD, typename Wide, typename Sum, typename C>
void multiply(Product<C>* const* lanes) {
    constexpr uint32_t K = 8 * PER_WORD;
    Wide a[M][K], b[K][N];
    for (uint32_t lane = 0; lane < WARP_LANES; lane++) {
        uint32_t g = lane / 4, t = lane % 4;
        for (uint32_t i = 0; i < PER_WORD; i++) {
            uint32_t k = PER_WORD * t + i;
            const Product<C>& mine = *lanes[lane];
            a[g][k] = wide(element<T, PER_WORD>(mine.a[0], i));
            a[g + 8][k] = wide(element<T, PER_WORD>(mine.a[1], i));
            a[g][k + K / 2] = wide(element<T, PER_WORD>(mine.a[2], i));
            a[g + 8][k + K / 2] = wide(element<T, PER_WORD>(mine.a[3], i));
            b[k][g] = wide(element<T, PER_WORD>(mine.b[0], i));
            b[k + K / 2][g] = wide(element<T, PER_WORD>(mine.b[1], i));
        }
    }
    Sum sums[M][N] = {};
    for (uint32_t row = 0; row < M; row++) {
        for (uint32_t k = 0; k < K; k++) {
            for (uint32_t col = 0; col < N; col++) sums[row][col] += Sum(a[row][k]) * Sum(b[k][col]);
        }
    }
    for (uint32_t lane = 0; lane < WARP_LANES; lane++) {
        uint32_t g = lane / 4, t = lane % 4;
        for (uint32_t i = 0; i < 4; i++) {
            C& c = lanes[lane]->c[i];
            c = rounded(c, Sum(c) + sums[g + i / 2 * 8][2 * t + i % 2]);
        }
    }
}

template <bool TRANSPOSED>
void load(MatrixLoad* const* lanes) {
    for (uint32_t matrix = 0; matrix < 4; matrix++) {
        uint16_t elements[8][8];
        for (uint32_t row = 0; row < 8; row++) memcpy(elements[row], lanes[matrix * 8 + row]->row, 16);
        for (uint32_t lane = 0; lane < WARP_LANES; lane++) {
            uint32_t g = lane / 4, t = lane % 4;
            uint32_t low = TRANSPOSED ? elements[2 * t][g] : elements[g][2 * t];
            uint32_t high = TRANSPOSED ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
            lanes[lane]->words[matrix] = low | high << 16;
        }
    }
}

}  // namespace

void multiply_bf16(Product<float>* const* lanes) { multiply<bf16, 2, double, double>(lanes); }
void multiply_f16(Product<float>* const* lanes) { multiply<f16, 2, double, double>(lanes); }
void multiply_fp8(Product<float>* const* lanes) { multiply<fp8, 4, double, double>(lanes); }
void multiply_s8(Product<int32_t>* const* lanes) { multiply<int8_t, 4, int32_t, int64_t>(lanes); }
void load_matrices(MatrixLoad* const* lanes) { load<false>(lanes); }
void load_matrices_transposed(MatrixLoad* const* lanes) { load<true>(lanes); }

}  // namespace emulation
