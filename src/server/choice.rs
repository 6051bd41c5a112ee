//! Fields whose value is one of a few words.

use serde::de::{DeserializeOwned, IntoDeserializer};
use serde::{Deserialize, Deserializer};

/// Reads one of the words of an enum, in upper or lower case. `null` and an empty text count as
/// absent.
pub(super) fn choice<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let text: Option<String> = Option::deserialize(deserializer)?;
    let word = text.unwrap_or_default().trim().to_ascii_lowercase();
    if word.is_empty() {
        return Ok(None);
    }
    T::deserialize(IntoDeserializer::<D::Error>::into_deserializer(word)).map(Some)
}
