//! Who sent a request.

use std::fmt;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// Who sent a request: the index of its API key, or `None` if the server has no keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller(pub Option<usize>);

impl Caller {
    /// Every client of a server without API keys.
    pub const ANYONE: Self = Self(None);
}

/// The owner of a stored job: the API key with which it was submitted, as a hash, so that the owner is
/// the same after a restart and on other machines, and no store contains a key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Owner(String);

impl Owner {
    /// Every client of a server without API keys.
    pub fn anyone() -> Self {
        Self("anyone".to_owned())
    }

    /// The holder of an API key.
    pub fn of_key(key: &str) -> Self {
        let hash = digest(&SHA256, format!("kiln job owner\n{key}").as_bytes());
        Self(hex(&hash.as_ref()[..16]))
    }

    /// Letters and digits only.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;

    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
