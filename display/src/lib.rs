//! How numbers and networks look to people, for `tapnat` and for the sandbox. Owns words and lines;
//! knows neither where the numbers come from nor what they are printed on.

pub mod palette;
pub mod picture;
pub mod units;
pub mod vector;

/// Whether colours are on is known to the whole process: tests that set it take turns.
#[cfg(test)]
static COLOURS: std::sync::Mutex<()> = std::sync::Mutex::new(());
