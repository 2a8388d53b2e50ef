//! How numbers and networks look to people, for `tapnat` and for the sandbox. Owns words and lines;
//! knows neither where the numbers come from nor what they are printed on.

pub mod palette;
pub mod units;
