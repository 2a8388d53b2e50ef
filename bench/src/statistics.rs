//! Of many noisy figures, one and its spread.

/// The middle one; NaN of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The smallest; infinite of none.
#[must_use]
pub fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The value that this share of all lies below, interpolated.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = share * (sorted.len().saturating_sub(1)) as f64;
    let below = sorted.get(place as usize).copied().unwrap_or(f64::NAN);
    let above = sorted.get(place.ceil() as usize).copied().unwrap_or(below);
    below + (above - below) * place.fract()
}

/// Two contenders compared: measured in the same rounds, in the same order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Of the minima.
    pub of_minima: f64,
    /// The median of each round's ratio.
    pub median: f64,
    /// The quarter and three-quarter points of each round's ratio.
    pub spread: [f64; 2],
}

impl Ratio {
    /// Of `one` to `other`.
    #[must_use]
    pub fn new(one: &[f64], other: &[f64]) -> Self {
        let ratios: Vec<_> = one
            .iter()
            .zip(other)
            .map(|(one, other)| one / other)
            .collect();
        Self {
            of_minima: minimum(one) / minimum(other),
            median: median(&ratios),
            spread: [quantile(&ratios, 0.25), quantile(&ratios, 0.75)],
        }
    }
}
