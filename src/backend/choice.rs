//! The names of backends and devices, as users write them.

use std::fmt;
use std::str::FromStr;

/// A backend of burn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    Cuda,
    Wgpu,
    Flex,
    Ndarray,
    /// The first of the above, in that order, that was compiled in and has a device here.
    Auto,
}

/// A backend and devices of it: `flex`, `cuda:1`, `cuda:0+1`, `auto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendChoice {
    pub(super) kind: BackendKind,
    /// Empty for the backend's first device.
    pub(super) devices: Vec<usize>,
}

/// Numbers of devices in `kiln backends`: `1` or `0,1`. A number may be there twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNumbers(pub Vec<usize>);

/// A word that is not one of the known names.
#[derive(Debug, thiserror::Error)]
#[error("{word:?} is not one of {known}")]
pub struct UnknownName {
    word: String,
    known: String,
}

impl UnknownName {
    pub(crate) fn new(word: &str, known: &[&str]) -> Self {
        Self {
            word: word.to_owned(),
            known: known.join(", "),
        }
    }
}

/// A part of a list of devices that is not the number of a device.
#[derive(Debug, thiserror::Error)]
#[error("{word:?} is not the number of a device; `kiln backends` lists them")]
pub struct NotANumber {
    word: String,
}

/// Why a text does not name a backend or devices as `cuda:1` does.
#[derive(Debug, thiserror::Error)]
pub enum InvalidChoice {
    #[error(transparent)]
    Backend(#[from] UnknownName),
    #[error(transparent)]
    Device(#[from] NotANumber),
    #[error(
        "auto chooses the device itself: name the backend that {} of",
        match devices.as_slice() {
            [index] => format!("device {index} is one"),
            devices => format!("devices {} are", joined(devices, ", ")),
        }
    )]
    DevicesOfAuto { devices: Vec<usize> },
}

impl BackendKind {
    /// Every backend, from the fastest to the slowest.
    pub const ALL: [Self; 4] = [Self::Cuda, Self::Wgpu, Self::Flex, Self::Ndarray];

    /// What [`FromStr`] accepts: the names of [`Self::ALL`], and `auto`.
    pub fn names() -> Vec<&'static str> {
        let kinds = Self::ALL.into_iter().chain([Self::Auto]);
        kinds.map(Self::name).collect()
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for BackendKind {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        let mut kinds = Self::ALL.into_iter().chain([Self::Auto]);
        kinds
            .find(|kind| kind.name() == word)
            .ok_or_else(|| UnknownName::new(word, &Self::names()))
    }
}

impl BackendChoice {
    /// `devices` are the devices' numbers in `kiln backends`; none stands for the first one.
    ///
    /// # Errors
    ///
    /// If devices are named for `auto`.
    pub fn new(kind: BackendKind, devices: Vec<usize>) -> Result<Self, InvalidChoice> {
        match kind {
            BackendKind::Auto if !devices.is_empty() => {
                Err(InvalidChoice::DevicesOfAuto { devices })
            }
            _ => Ok(Self { kind, devices }),
        }
    }

    pub fn kind(&self) -> BackendKind {
        self.kind
    }

    /// The devices' numbers; empty for the backend's first device.
    pub fn devices(&self) -> &[usize] {
        &self.devices
    }
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(formatter)?;
        if self.devices.is_empty() {
            return Ok(());
        }
        write!(formatter, ":{}", joined(&self.devices, "+"))
    }
}

/// Several devices are separated by `+`, as commas separate backends.
impl FromStr for BackendChoice {
    type Err = InvalidChoice;

    fn from_str(text: &str) -> Result<Self, InvalidChoice> {
        let (kind, devices) = match text.split_once(':') {
            None => (text, Vec::new()),
            Some((kind, devices)) => (kind, numbers(devices, '+')?),
        };
        Self::new(kind.parse()?, devices)
    }
}

impl FromStr for DeviceNumbers {
    type Err = NotANumber;

    fn from_str(text: &str) -> Result<Self, NotANumber> {
        numbers(text, ',').map(Self)
    }
}

fn numbers(text: &str, separator: char) -> Result<Vec<usize>, NotANumber> {
    let words = text.split(separator).map(str::trim);
    words
        .map(|word| {
            let is_number = word.bytes().all(|byte| byte.is_ascii_digit());
            let number = word.parse().ok().filter(|_| is_number);
            number.ok_or_else(|| NotANumber {
                word: word.to_owned(),
            })
        })
        .collect()
}

/// Numbers as text: `0,1`.
pub(super) fn joined(numbers: &[usize], separator: &str) -> String {
    let numbers = numbers.iter().map(usize::to_string);
    numbers.collect::<Vec<_>>().join(separator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_parses_back_from_its_text() {
        for text in ["flex", "cuda:1", "wgpu:0", "cuda:0+1", "flex:0+0+0", "auto"] {
            assert_eq!(text.parse::<BackendChoice>().unwrap().to_string(), text);
        }
        let choice: BackendChoice = "cuda:12".parse().unwrap();
        assert_eq!(
            (choice.kind(), choice.devices()),
            (BackendKind::Cuda, [12].as_slice())
        );
    }

    #[test]
    fn an_invalid_choice_is_quoted() {
        for (text, expected) in [
            (
                "tpu",
                "\"tpu\" is not one of cuda, wgpu, flex, ndarray, auto",
            ),
            ("tpu:0", "\"tpu\" is not one of"),
            ("", "\"\" is not one of"),
            ("cuda:", "\"\" is not the number of a device"),
            ("cuda:-1", "\"-1\" is not the number of a device"),
            ("cuda:0:1", "\"0:1\" is not the number of a device"),
            ("cuda:0+", "\"\" is not the number of a device"),
            ("cuda:0++1", "\"\" is not the number of a device"),
            ("auto:2", "name the backend that device 2 is one of"),
            ("auto:0+1", "name the backend that devices 0, 1 are of"),
        ] {
            let error = text.parse::<BackendChoice>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn device_numbers_are_separated_by_commas() {
        for (text, expected) in [
            ("0", vec![0]),
            ("0,1", vec![0, 1]),
            ("3, 1,1 ", vec![3, 1, 1]),
        ] {
            assert_eq!(text.parse::<DeviceNumbers>().unwrap().0, expected, "{text}");
        }
        for (text, expected) in [
            (
                "",
                "\"\" is not the number of a device; `kiln backends` lists them",
            ),
            ("0,", "\"\" is not the number"),
            (",0", "\"\" is not the number"),
            ("0,,1", "\"\" is not the number"),
            ("first", "\"first\" is not the number"),
            ("0,-1", "\"-1\" is not the number"),
            ("+1", "\"+1\" is not the number"),
            (
                "99999999999999999999999",
                "\"99999999999999999999999\" is not",
            ),
        ] {
            let error = text.parse::<DeviceNumbers>().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
