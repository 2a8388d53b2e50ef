//! Of many noisy figures, one and its spread.

use serde::Serialize;

/// Which figures are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Lower,
    Higher,
}

impl Better {
    /// The best one: what the noise disturbed least; NaN of none.
    #[must_use]
    pub fn best(self, values: &[f64]) -> f64 {
        values.iter().copied().fold(
            f64::NAN,
            match self {
                Self::Lower => f64::min,
                Self::Higher => f64::max,
            },
        )
    }
}

/// The sum of all by their number; NaN of none.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The middle one; NaN of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value that this share of all lies below, interpolated; NaN of none.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = share * (sorted.len().saturating_sub(1)) as f64;
    let below = sorted.get(place as usize).copied().unwrap_or(f64::NAN);
    let above = sorted.get(place.ceil() as usize).copied().unwrap_or(below);
    below + (above - below) * place.fract()
}

/// Two contenders compared: measured in the same rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the best figures.
    pub of_best: f64,
    /// The median of each round's ratio.
    pub median: f64,
    /// The quarter and three-quarter points of each round's ratio.
    pub spread: [f64; 2],
}

impl Ratio {
    /// Of `one` to `other`.
    #[must_use]
    pub fn new(one: &[f64], other: &[f64], better: Better) -> Self {
        let ratios: Vec<_> = one
            .iter()
            .zip(other)
            .map(|(one, other)| one / other)
            .collect();
        Self {
            of_best: better.best(one) / better.best(other),
            median: median(&ratios),
            spread: [quantile(&ratios, 0.25), quantile(&ratios, 0.75)],
        }
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these come out exactly")]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(
            [0.0, 0.5, 1.0].map(|share| quantile(&values, share)),
            [1.0, 2.5, 4.0]
        );
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // Noise of a whole round cancels out.
        let ratio = Ratio::new(&[2.0, 20.0, 4.0], &[1.0, 10.0, 2.0], Better::Lower);
        assert_eq!(ratio.of_best, 2.0);
        assert_eq!(ratio.median, 2.0);
        assert_eq!(ratio.spread, [2.0, 2.0]);
        assert_eq!(Better::Higher.best(&[2.0, 20.0, 4.0]), 20.0);
    }
}
