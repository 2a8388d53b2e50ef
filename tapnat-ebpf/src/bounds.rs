//! Bounds of numbers, as verifiers see them.

use core::hint::black_box;

/// The number, if it is 1 at least and `most` at most, said in a way that the
/// verifiers of all kernels follow: the register that is compared is the one that
/// is used, and that it is not 0 shows without a comparison with 0.
#[inline(always)]
pub fn within(number: u32, most: u32) -> Option<u32> {
    let less = black_box(u64::from(number).wrapping_sub(1));
    (less < u64::from(most)).then(|| black_box(less) as u32 + 1)
}
