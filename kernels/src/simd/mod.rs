//! Sixteen lanes of `f32`, the same bits on every instruction set.
//!
//! Every kernel is written once, generic over [`Simd`], and compiled for each [`Level`]. All levels compute the same
//! function of each lane: fused multiply-adds, exact integer dot products, and one fixed tree for horizontal sums. A
//! kernel's result is therefore independent of the level, which the tests check bit for bit.
//!
//! Nothing here knows tensors, threads or models.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Number of `f32` lanes of every vector, on every level.
pub const LANES: usize = 16;

/// The instruction sets that kernels are compiled for, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust; the reference for the others.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl Level {
    /// The best level that this processor supports.
    pub fn detect() -> Self {
        *Self::available().last().unwrap_or(&Self::Portable)
    }

    /// All levels that this processor can run, slowest first.
    pub fn available() -> &'static [Level] {
        const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512Vnni];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            match (avx512, avx2) {
                (true, _) => &ALL,
                (false, true) => &ALL[..2],
                (false, false) => &ALL[..1],
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        &ALL[..1]
    }
}

/// A kernel: a function compiled for every level.
pub(crate) trait Kernel {
    type Output;

    /// Implementations are `#[inline(always)]`, and so is every function they call with `S`, so that the body is compiled
    /// with the features of the level. Vector operations stand in plain loops, never in a closure: a closure that the
    /// compiler keeps apart would call each instruction as a function.
    fn run<S: Simd>(self) -> Self::Output;
}

/// Runs `kernel` at `level`.
pub(crate) fn dispatch<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level {
        Level::Portable => kernel.run::<portable::Portable>(),
        // SAFETY: a `Level` above `Portable` comes from `Level::available`, which has detected its features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::run(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => unsafe { avx512::run(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => kernel.run::<portable::Portable>(),
    }
}

/// The operations of one level. All pointers may be unaligned; the caller guarantees that they are valid for the sixteen
/// elements (or 64 bytes) read or written.
///
/// # Safety
/// Implementors' methods may be called only where [`dispatch`] has compiled and detected the level's features.
pub(crate) unsafe trait Simd: Copy + 'static {
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;
    /// 64 × u8.
    type B: Copy;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn load_f16(from: *const u16) -> Self::F;
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    unsafe fn store(to: *mut f32, value: Self::F);

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Lane-wise maximum of values that are not NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `2^n` for lanes that hold integers in [-126, 127].
    unsafe fn exp2_integer(n: Self::F) -> Self::F;
    /// `yes` where `a < b`, else `no`.
    unsafe fn select_less(a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;

    /// `((l0+l8)+(l4+l12)) + …`: the fixed tree lane i + lane i+8, then +4, +2, +1.
    unsafe fn reduce_sum(a: Self::F) -> f32;
    unsafe fn reduce_max(a: Self::F) -> f32;

    unsafe fn splat_i(value: i32) -> Self::I;
    /// Exact for |value| < 2^24.
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// Rounds to nearest even and stores the low bytes; lanes hold values in [-128, 127].
    unsafe fn store_i8(to: *mut i8, value: Self::F);

    unsafe fn load_b(from: *const u8) -> Self::B;
    unsafe fn low_nibbles(b: Self::B) -> Self::B;
    unsafe fn high_nibbles(b: Self::B) -> Self::B;
    /// `acc[l] + Σ_{j<4} b[4l+j] · a[j]` for unsigned bytes `b` below 128 and the four signed bytes at `a`.
    unsafe fn dot_u7(acc: Self::I, b: Self::B, a: *const i8) -> Self::I;
    /// The same for any unsigned bytes `b`.
    unsafe fn dot_u8(acc: Self::I, b: Self::B, a: *const i8) -> Self::I;
}

/// `e^x`; 0 below -87, so masked scores (-inf) vanish exactly. At most 2 ulp off for x in [-87, 88]; larger x give e^88.
///
/// Cody-Waite reduction to |r| <= ln(2)/2, then a degree-6 polynomial in Horner form.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller may use `S`.
    unsafe {
        let clamped = S::min(S::max(x, S::splat(-87.0)), S::splat(88.0));
        let n = S::round(S::mul(clamped, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), clamped);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.388_889_e-3);
        for coefficient in [8.333_334e-3, 4.166_666_8e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(coefficient));
        }
        let value = S::mul(p, S::exp2_integer(n));
        S::select_less(x, S::splat(-87.0), S::splat(0.0), value)
    }
}
