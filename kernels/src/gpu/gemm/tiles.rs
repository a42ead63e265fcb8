//! The tiles of the dense kernels, and the choice of one for a product. Nothing here affects the bits of a result.

use super::{Arithmetic, DenseType, SLICE_BYTES};

/// One kernel: `features` rows of the weights by `tokens` rows of activations a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tile {
    pub features: usize,
    pub tokens: usize,
    pub threads: usize,
    pub shared_bytes: usize,
    /// Features that the instructions compute, including unused ones.
    computed_features: usize,
    costs: &'static Costs,
    kernels: [&'static str; 3],
}

impl Tile {
    pub(super) fn kernel(&self, ty: DenseType) -> &'static str {
        match ty {
            DenseType::F16 => self.kernels[0],
            DenseType::BF16 => self.kernels[1],
            DenseType::Fp8 => self.kernels[2],
        }
    }
}

/// What one multiprocessor of a device generation can do per cycle. These are rough figures from data sheets, used only to rank
/// tiles.
#[derive(Debug, PartialEq)]
struct Costs {
    /// Products of 16-bit numbers.
    products: f64,
    /// Bytes from the cache to one multiprocessor alone, and to each when all read at once.
    cache_bytes: f64,
    shared_cache_bytes: f64,
    /// Bytes from memory to one multiprocessor alone, and to each when all read at once.
    memory_bytes: f64,
    shared_memory_bytes: f64,
    /// Minimum cycles for a slice of 128 bytes, however small the tile, and for writing the sums.
    slice: f64,
    write: f64,
}

static AMPERE: Costs = Costs {
    products: 1024.0,
    cache_bytes: 48.0,
    shared_cache_bytes: 32.0,
    memory_bytes: 14.0,
    shared_memory_bytes: 11.0,
    slice: 60.0,
    write: 1000.0,
};
static HOPPER: Costs = Costs {
    products: 2048.0,
    cache_bytes: 56.0,
    shared_cache_bytes: 32.0,
    memory_bytes: 18.0,
    shared_memory_bytes: 14.0,
    slice: 60.0,
    write: 1000.0,
};

/// Pads a staged row of sums.
const STAGED_PADDING: usize = 4;

macro_rules! mma {
    ($features:literal x $tokens:literal, warps $warps:literal, stages $stages:literal) => {
        Tile {
            features: $features,
            tokens: $tokens,
            threads: $warps * 32,
            shared_bytes: $stages * ($features + $tokens) * SLICE_BYTES,
            computed_features: $features,
            costs: &AMPERE,
            kernels: [
                concat!("gemm_f16_", $features, "x", $tokens),
                concat!("gemm_bf16_", $features, "x", $tokens),
                concat!("gemm_fp8_", $features, "x", $tokens),
            ],
        }
    };
}

macro_rules! wgmma {
    ($features:literal x $tokens:literal, slices $slices:literal, stages $stages:literal) => {
        Tile {
            features: $features,
            tokens: $tokens,
            threads: wgmma_threads($features),
            shared_bytes: wgmma_shared_bytes($features, $tokens, $slices * $stages),
            computed_features: wgmma_features($features),
            costs: &HOPPER,
            kernels: [
                concat!("gemm_sm90_f16_", $features, "x", $tokens),
                concat!("gemm_sm90_bf16_", $features, "x", $tokens),
                concat!("gemm_sm90_fp8_", $features, "x", $tokens),
            ],
        }
    };
}

/// In warpgroups of 64.
const fn wgmma_features(features: usize) -> usize {
    features.div_ceil(64) * 64
}

/// The multiplying warpgroups, and one warp that copies.
const fn wgmma_threads(features: usize) -> usize {
    wgmma_features(features) / 64 * 128 + 32
}

/// The ring, and the sums on their way out. An instruction with fewer weights than 64 reads on past them, and past the ring
/// in its last stage.
const fn wgmma_shared_bytes(features: usize, tokens: usize, slices: usize) -> usize {
    let rows = if features < 64 { features } else { 64 };
    let staged_tokens = if tokens < 32 { tokens } else { 32 };
    let staged = features.div_ceil(64) * staged_tokens * (rows + STAGED_PADDING) * size_of::<f32>();
    let read_past = 64 * SLICE_BYTES;
    slices * (features + tokens) * SLICE_BYTES + if staged > read_past { staged } else { read_past }
}

/// As in `gemm.cu`.
static MMA: &[Tile] = &[
    mma!(32 x 8, warps 2, stages 8),
    mma!(32 x 16, warps 2, stages 8),
    mma!(64 x 32, warps 4, stages 6),
    mma!(64 x 64, warps 4, stages 4),
    mma!(128 x 128, warps 8, stages 3),
];

/// As in `gemm_sm90.cu`.
static WGMMA: &[Tile] = &[
    wgmma!(16 x 8, slices 2, stages 24),
    wgmma!(32 x 8, slices 2, stages 16),
    wgmma!(64 x 8, slices 2, stages 9),
    wgmma!(16 x 16, slices 2, stages 20),
    wgmma!(32 x 16, slices 2, stages 14),
    wgmma!(64 x 16, slices 2, stages 8),
    wgmma!(32 x 32, slices 2, stages 10),
    wgmma!(64 x 32, slices 2, stages 7),
    wgmma!(32 x 64, slices 2, stages 7),
    wgmma!(64 x 64, slices 2, stages 6),
    wgmma!(128 x 64, slices 1, stages 8),
    wgmma!(64 x 128, slices 1, stages 8),
    wgmma!(128 x 128, slices 1, stages 6),
    wgmma!(128 x 256, slices 1, stages 4),
];

pub(super) fn of(arithmetic: Arithmetic) -> &'static [Tile] {
    match arithmetic {
        Arithmetic::Mma => MMA,
        Arithmetic::Wgmma => WGMMA,
    }
}

/// The tile with the least estimated time for `m` rows by `n` features of `row_bytes`.
pub(super) fn choose(
    tiles: &'static [Tile],
    n: usize,
    m: usize,
    row_bytes: usize,
    multiprocessors: usize,
) -> &'static Tile {
    let product = Product { n, m, slices: row_bytes.div_ceil(SLICE_BYTES), multiprocessors };
    let by_cycles = |a: &&Tile, b: &&Tile| product.cycles(a).total_cmp(&product.cycles(b));
    tiles.iter().min_by(by_cycles).expect("there are tiles")
}

struct Product {
    n: usize,
    m: usize,
    slices: usize,
    multiprocessors: usize,
}

impl Product {
    /// Each multiprocessor processes one tile at a time; in the last round some may be idle.
    fn cycles(&self, tile: &Tile) -> f64 {
        let tiles = self.n.div_ceil(tile.features) * self.m.div_ceil(tile.tokens);
        let (rounds, last) = (tiles / self.multiprocessors, tiles % self.multiprocessors);
        let mut cycles = tile.costs.write + rounds as f64 * self.round(tile, self.multiprocessors);
        if last > 0 {
            cycles += self.round(tile, last);
        }
        cycles
    }

    /// One tile on each of `busy` multiprocessors. Copies continue while sums are written, products do not.
    fn round(&self, tile: &Tile, busy: usize) -> f64 {
        let costs = tile.costs;
        let share = self.multiprocessors as f64 / busy as f64;
        let tokens = tile.tokens.min(self.m);
        let cached = ((tile.features + tokens) * SLICE_BYTES) as f64;
        // Tiles of other tokens read the same weights at about the same time.
        let readers = self.m.div_ceil(tile.tokens).min(busy);
        let weights = (tile.features * SLICE_BYTES) as f64 / readers as f64;
        let copies = (cached / costs.cache_bytes.min(costs.shared_cache_bytes * share))
            .max(weights / (costs.memory_bytes / readers as f64).min(costs.shared_memory_bytes * share));
        let products = (tile.computed_features * tile.tokens * SLICE_BYTES / 2) as f64 / costs.products;
        let slices = self.slices as f64;
        (slices * copies).max(slices * products.max(costs.slice) + costs.write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: usize = 132;

    fn chosen(n: usize, m: usize, k: usize) -> (usize, usize) {
        let tile = choose(WGMMA, n, m, k * 2, H100);
        (tile.features, tile.tokens)
    }

    /// Products limited by memory should spread the weights evenly over all multiprocessors.
    #[test]
    fn few_tokens_spread_the_weights() {
        for (n, k) in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128_256, 4096)] {
            for m in [1, 8] {
                let (features, tokens) = chosen(n, m, k);
                assert_eq!(tokens, 8);
                let each = n.div_ceil(features).div_ceil(H100) * features;
                assert!(each * H100 < n * 5 / 4, "{n}x{k}: {features} features a tile leave {each} to one of {H100}");
            }
            assert!(chosen(n, 64, k).1 <= 64);
        }
    }

    #[test]
    fn many_tokens_take_the_largest_tile() {
        for (n, k) in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)] {
            assert_eq!(chosen(n, 8192, k), (128, 256));
        }
    }

    #[test]
    fn every_tile_fits_a_multiprocessor() {
        assert!(WGMMA.iter().all(|tile| tile.shared_bytes <= 226 * 1024), "a KiB is the barriers'");
        assert!(MMA.iter().all(|tile| tile.shared_bytes <= 99 * 1024));
    }
}
