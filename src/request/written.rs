//! Values as clients write them, in JSON and on the command line: one reader for both.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// The largest number up to which a float is certainly the integer that was written: 2^53.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// Any integer that JSON can hold, `4.0` included. Its range is checked later, where the bounds
/// are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Integer(pub i128);

impl Integer {
    fn from_float(value: f64) -> Option<Self> {
        let is_exact = value.fract() == 0.0 && value.abs() <= MAX_EXACT;
        is_exact.then_some(Self(value as i128))
    }
}

/// A text that is not an [`Integer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be an integer, such as 42")]
pub struct NotAnInteger;

impl FromStr for Integer {
    type Err = NotAnInteger;

    fn from_str(text: &str) -> Result<Self, NotAnInteger> {
        let integer = text.parse().ok().map(Self);
        integer
            .or_else(|| Self::from_float(text.parse().ok()?))
            .ok_or(NotAnInteger)
    }
}

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntegerVisitor;

        impl Visitor<'_> for IntegerVisitor {
            type Value = Integer;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an integer")
            }

            fn visit_i64<E>(self, value: i64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Integer, E> {
                Integer::from_float(value)
                    .ok_or_else(|| E::invalid_type(Unexpected::Float(value), &self))
            }
        }

        deserializer.deserialize_any(IntegerVisitor)
    }
}

/// The size of an image as written: `1024x768`, `1024*768`, `auto`, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrittenSize {
    /// An empty text, which counts as absent.
    Absent,
    /// The model's own size.
    Auto,
    /// In pixels, before they are checked.
    Pixels { width: i128, height: i128 },
}

/// A text that is not a [`WrittenSize`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be auto, or WIDTHxHEIGHT in pixels such as 1024x768, got {0:?}")]
pub struct NotASize(String);

impl WrittenSize {
    /// Width and height, if they were written.
    pub fn sides(self) -> (Option<i128>, Option<i128>) {
        match self {
            Self::Absent | Self::Auto => (None, None),
            Self::Pixels { width, height } => (Some(width), Some(height)),
        }
    }
}

impl FromStr for WrittenSize {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Ok(Self::Absent);
        }
        if trimmed.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        let side = |digits: &str| {
            let digits = digits.trim();
            let only_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| only_digits)
        };
        let sides = trimmed.split_once(['x', 'X', '*', '×']);
        sides
            .and_then(|(width, height)| {
                Some(Self::Pixels {
                    width: side(width)?,
                    height: side(height)?,
                })
            })
            .ok_or_else(|| NotASize(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for WrittenSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_the_command_line_may_be_whole_fractions_as_in_json() {
        let read = |text: &str| text.parse::<Integer>().map(|Integer(value)| value).ok();
        for (text, value) in [
            ("42", 42),
            ("42.0", 42),
            ("-1", -1),
            ("-1.0", -1),
            ("4e1", 40),
            ("18446744073709551616", 1 << 64),
        ] {
            assert_eq!(read(text), Some(value), "{text}");
            let json: Result<Integer, _> = serde_json::from_str(text);
            // JSON has no integers above 64 bits.
            assert!(
                value >= 1 << 64 || json.unwrap() == Integer(value),
                "{text}"
            );
        }
        for text in ["", "x", "4.5", "1e30", "inf", "NaN", "4,0", "0x10", " 4"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn a_size_is_width_by_height_in_the_forms_that_clients_write() {
        let pixels = Ok(WrittenSize::Pixels {
            width: 1024,
            height: 768,
        });
        for text in [
            "1024x768",
            "1024X768",
            "1024*768",
            "1024×768",
            "1024 x 768",
            " 1024x768\n",
        ] {
            assert_eq!(text.parse(), pixels, "{text}");
        }
        for text in ["auto", "AUTO", "Auto", " auto "] {
            assert_eq!(text.parse(), Ok(WrittenSize::Auto), "{text}");
        }
        for text in ["", " "] {
            assert_eq!(text.parse(), Ok(WrittenSize::Absent), "{text}");
        }
        for text in [
            "x", "1024", "1024x", "x768", "-4x4", "+4x4", "4x4x4", "4*4*4", "4.0x4", "autox",
            "4:4", "large",
        ] {
            let error = text.parse::<WrittenSize>().unwrap_err();
            assert_eq!(error, NotASize(text.to_owned()), "{text}");
        }
    }
}
