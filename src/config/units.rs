//! Durations and sizes as people write them: `250ms`, `40MiB`.
//!
//! A bare number is refused as a duration, because half of its readers would take seconds for milliseconds. It is taken
//! as a size, where bytes are the only reading. Numbers are whole: what `1.5s` means is plain, `1500ms` is too, and one
//! spelling is enough.
//!
//! [`duration`] and [`size`] are made for `#[serde(with = "...")]`. They fail inside a visitor, which is what lets the
//! YAML reader say where.

use std::fmt;
use std::time::Duration;

use serde::de::{Deserializer, Error, Visitor};

const DURATIONS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1000),
    ("ms", 1),
];

const SIZES: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("KB", 1000),
    ("B", 1),
];

/// Reads a duration: a whole number and one of `ms`, `s`, `m`, `h`, `d`.
///
/// # Errors
/// A sentence with an example of what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration: write a whole number and ms, s, m, h or d, as in `250ms`");
    let (number, unit) = split(text);
    if unit.is_empty() && !number.is_empty() {
        return Err(format!(
            "`{text}` has no unit: a duration is a whole number and ms, s, m, h or d, as in `30s`"
        ));
    }
    let (_, millis) = DURATIONS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number
        .checked_mul(*millis)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("`{text}` is too long a time"))
}

/// Reads a size in bytes: a whole number and `B`, `KiB`, `MiB`, `GiB`, `TiB`, `kB`, `MB`, `GB`, `TB` or nothing.
///
/// # Errors
/// A sentence with an example of what would be right.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("`{text}` is not a size: write bytes, or a whole number and a unit, as in `40MiB` or `10MB`");
    let (number, unit) = split(text);
    let (_, bytes) = SIZES
        .iter()
        .find(|(name, _)| *name == unit || unit.is_empty() && *name == "B")
        .ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number
        .checked_mul(*bytes)
        .ok_or_else(|| format!("`{text}` is too large a size"))
}

/// Writes a duration with the largest unit that divides it; below a millisecond is not kept.
pub fn format_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    largest(millis, &DURATIONS).unwrap_or_else(|| "0s".to_owned())
}

/// Writes a size with the largest binary unit that divides it, else in bytes.
pub fn format_size(bytes: u64) -> String {
    largest(bytes, &SIZES[..4]).unwrap_or_else(|| bytes.to_string())
}

fn largest(amount: u64, units: &[(&str, u64)]) -> Option<String> {
    let (unit, factor) = units
        .iter()
        .find(|(_, factor)| amount > 0 && amount.is_multiple_of(*factor))?;
    Some(format!("{}{unit}", amount / factor))
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    (number, unit.trim_start())
}

/// Takes a scalar as text and reads it with `parse`, so that a failure carries its place.
pub(super) fn scalar<'de, D, T>(deserializer: D, parse: fn(&str) -> Result<T, String>) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    struct Scalar<T>(fn(&str) -> Result<T, String>);

    impl<T> Visitor<'_> for Scalar<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a single value")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            (self.0)(text).map_err(E::custom)
        }
    }

    deserializer.deserialize_str(Scalar(parse))
}

/// As [`scalar`], with `null` and the empty text as `None`.
pub(super) fn optional<'de, D, T>(deserializer: D, parse: fn(&str) -> Result<T, String>) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Optional<T>(fn(&str) -> Result<T, String>);

    impl<'de, T> Visitor<'de> for Optional<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a single value or nothing")
        }

        fn visit_none<E: Error>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
            deserializer.deserialize_str(self)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Option<T>, E> {
            if text.is_empty() {
                Ok(None)
            } else {
                (self.0)(text).map(Some).map_err(E::custom)
            }
        }
    }

    deserializer.deserialize_option(Optional(parse))
}

/// A [`Duration`] with a unit, for `#[serde(with)]`.
pub mod duration {
    use super::*;

    /// Reads what [`parse_duration`] reads.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        scalar(deserializer, parse_duration)
    }

    /// Writes what [`format_duration`] writes.
    pub fn serialize<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_duration(*duration))
    }
}

/// A size in bytes with a unit, for `#[serde(with)]`.
pub mod size {
    use super::*;

    /// Reads what [`parse_size`] reads.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        scalar(deserializer, parse_size)
    }

    /// Writes what [`format_size`] writes.
    pub fn serialize<S: serde::Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_size(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, millis) in [
            ("250ms", 250),
            ("1s", 1000),
            ("10m", 600_000),
            ("1h", 3_600_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse_duration(" 3 s "), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn bad_durations_are_told_an_example() {
        for text in [
            "",
            "s",
            "-1s",
            "1.5s",
            "1 fortnight",
            "1S",
            "1h30m",
            "0x1s",
            "99999999999999999999s",
        ] {
            assert!(parse_duration(text).unwrap_err().contains("as in `250ms`"), "{text}");
        }
        assert!(parse_duration("30").unwrap_err().contains("has no unit"));
        assert!(
            parse_duration("18446744073709551615h")
                .unwrap_err()
                .contains("too long")
        );
    }

    #[test]
    fn sizes_have_units_or_are_bytes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("7B", 7),
            ("512KiB", 512 << 10),
            ("40MiB", 40 << 20),
            ("1GiB", 1 << 30),
            ("1TiB", 1 << 40),
            ("3kB", 3000),
            ("3KB", 3000),
            ("10MB", 10_000_000),
            ("1GB", 1_000_000_000),
            ("1TB", 1_000_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_are_told_an_example() {
        for text in ["", "MiB", "-1", "1.5MiB", "40mib", "40M", "4 0"] {
            assert!(parse_size(text).unwrap_err().contains("as in `40MiB`"), "{text}");
        }
        assert!(parse_size("18446744073709551615KiB").unwrap_err().contains("too large"));
    }

    #[test]
    fn the_largest_exact_unit_is_written() {
        for (millis, text) in [
            (0, "0s"),
            (250, "250ms"),
            (1500, "1500ms"),
            (600_000, "10m"),
            (86_400_000, "1d"),
        ] {
            assert_eq!(format_duration(Duration::from_millis(millis)), text);
        }
        for (bytes, text) in [(0, "0"), (1000, "1000"), (40 << 20, "40MiB"), (1 << 40, "1TiB")] {
            assert_eq!(format_size(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(amount in 0..u64::MAX / 2) {
            let duration = Duration::from_millis(amount);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
            prop_assert_eq!(parse_size(&format_size(amount)), Ok(amount));
        }
    }
}
