//! The order of measurements: contenders take turns, back and forth, so that what changes on the
//! machine with time hits all of them.

use std::{io::Write as _, time::Duration};

use anyhow::Result;

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub quick: bool,
    pub rounds: usize,
    /// Of one contender's turn.
    pub length: Duration,
}

impl Effort {
    /// Enough to publish, or just enough to see that it works.
    #[must_use]
    pub const fn new(quick: bool) -> Self {
        if quick {
            Self {
                quick,
                rounds: 6,
                length: Duration::from_millis(150),
            }
        } else {
            Self {
                quick,
                rounds: 20,
                length: Duration::from_millis(400),
            }
        }
    }
}

/// Measures all contenders in every round: A B .. B A A B .. and so on. Returns for each contender
/// and each of its figures the values of all rounds.
///
/// # Errors
///
/// What the measurement returns.
pub fn interleave<T, const FIGURES: usize>(
    contenders: &mut [T],
    rounds: usize,
    mut measure: impl FnMut(&mut T) -> Result<[f64; FIGURES]>,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let mut values: Vec<_> = contenders
        .iter()
        .map(|_| vec![Vec::with_capacity(rounds); FIGURES])
        .collect();
    for round in 0..rounds {
        eprint!("\rround {} of {rounds} ", round + 1);
        let _ = std::io::stderr().flush();
        let mut turns: Vec<_> = contenders.iter_mut().zip(&mut values).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for (contender, values) in turns {
            for (value, values) in measure(contender)?.into_iter().zip(values) {
                values.push(value);
            }
        }
    }
    eprint!("\r\x1b[K");
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_go_back_and_forth() -> Result<()> {
        let mut order = Vec::new();
        let values = interleave(&mut ['a', 'b', 'c'], 3, |name| {
            order.push(*name);
            Ok([order.len() as f64])
        })?;
        assert_eq!(order.iter().collect::<String>(), "abccbaabc");
        assert_eq!(values[1], [[2.0, 5.0, 8.0]]);
        Ok(())
    }
}
