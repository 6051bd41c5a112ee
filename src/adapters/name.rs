//! The names of adapters.

/// Maximum length of a name in bytes.
const MAX_BYTES: usize = 200;

/// Refuses what cannot be the name of an adapter. The error continues "the name of an adapter".
///
/// A name has letters, digits, `.`, `_` and `-`, and `/` between its parts, none of which begins with a
/// dot.
pub(super) fn check(name: &str) -> Result<(), String> {
    if name.len() > MAX_BYTES {
        return Err(format!("has {MAX_BYTES} characters at most"));
    }
    let strange = |letter: &char| !letter.is_ascii_alphanumeric() && !"._-/".contains(*letter);
    if let Some(letter) = name.chars().find(strange) {
        return Err(format!(
            "has letters from A to Z, digits and . _ - / only, not {letter:?}"
        ));
    }
    if name
        .split('/')
        .any(|part| part.is_empty() || part.starts_with('.'))
    {
        return Err("has no empty part, and none that begins with a dot".to_owned());
    }
    Ok(())
}
