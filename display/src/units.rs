//! Numbers and addresses as people read them.

/// A count with its thousands apart: `12,345`. From a million on it has a prefix: `1.23 M`.
#[must_use]
pub fn count(number: u64) -> String {
    if number > 999_999 {
        return scale(number, "");
    }
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in decimal units: `1.21 GB`.
#[must_use]
pub fn bytes(number: u64) -> String {
    if number < 1000 {
        return format!("{number} B");
    }
    scale(number, "B")
}

/// A rate in bits per second: `9.81 Gbit/s`.
#[must_use]
pub fn rate(bits_per_second: u64) -> String {
    if bits_per_second < 1000 {
        return format!("{bits_per_second} bit/s");
    }
    scale(bits_per_second, "bit/s")
}

/// The number with three digits and the prefix of the unit that fits them.
#[expect(clippy::cast_precision_loss, reason = "three digits of it are shown")]
fn scale(number: u64, unit: &str) -> String {
    let mut number = number as f64;
    let mut prefixes = ["k", "M", "G", "T"].iter();
    let mut prefix = "";
    // What would be rounded to 1000 is one of the next prefix.
    while number >= 999.5 {
        let Some(next) = prefixes.next() else { break };
        (number, prefix) = (number / 1000.0, next);
    }
    let digits = match number {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{number:.digits$} {prefix}{unit}")
}

/// A text that takes no more than so many columns: what is longer lacks its middle, as addresses of
/// one network differ at the end.
#[must_use]
pub fn shortened(text: &str, columns: usize) -> String {
    let letters: Vec<_> = text.chars().collect();
    if letters.len() <= columns {
        return text.to_owned();
    }
    let kept = columns.saturating_sub(1);
    let (head, tail) = (kept / 2, kept.div_ceil(2));
    let head = letters.iter().take(head);
    let tail = letters.iter().skip(letters.len() - tail);
    head.chain([&'…']).chain(tail).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_their_thousands_apart() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (12_345, "12,345"),
            (999_999, "999,999"),
            (1_234_567, "1.23 M"),
        ] {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn bytes_have_three_digits_and_a_unit() {
        for (number, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (12_345, "12.3 kB"),
            (99_960, "100 kB"),
            (999_499, "999 kB"),
            (999_999, "1.00 MB"),
            (1_210_000_000, "1.21 GB"),
            (u64::MAX, "18446744 TB"),
        ] {
            assert_eq!(bytes(number), text);
        }
        assert_eq!(rate(9_810_000_000), "9.81 Gbit/s");
        assert_eq!(rate(12), "12 bit/s");
    }

    #[test]
    fn long_addresses_keep_both_ends() {
        let address = "fd00:7a70::5054:ff:fe12:3456";
        assert_eq!(shortened(address, 28), address);
        assert_eq!(shortened(address, 15), "fd00:7a…12:3456");
        assert_eq!(shortened("10.0.0.1", 15), "10.0.0.1");
        assert_eq!(shortened(address, 1), "…");
    }
}
