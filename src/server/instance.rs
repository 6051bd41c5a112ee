//! The name of a server among others.

/// Longest name, in bytes.
const MAX_BYTES: usize = 128;

/// A text that cannot be the name of a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name of an instance has 1 to {MAX_BYTES} printable ASCII characters, and no space at either \
     end"
)]
pub struct InvalidInstance;

/// Checks a name of a server: it goes into a header of every answer as it is.
///
/// # Errors
///
/// If it is too long, or has other characters than printable ASCII.
pub fn check_instance(name: &str) -> Result<(), InvalidInstance> {
    let is_printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    let is_valid = (1..=MAX_BYTES).contains(&name.len())
        && name.bytes().all(is_printable)
        && name.trim() == name;
    is_valid.then_some(()).ok_or(InvalidInstance)
}

/// The machine's host name, which Kubernetes sets to the pod's name; `kiln` if there is none.
pub(crate) fn host_name() -> String {
    #[cfg(unix)]
    {
        let name = rustix::system::uname();
        let name = name.nodename().to_string_lossy();
        if check_instance(&name).is_ok() {
            return name.into_owned();
        }
    }
    "kiln".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_printable() {
        let longest = "x".repeat(MAX_BYTES);
        for name in ["kiln-7d9f-x2", "gpu 3, rack b", "\"\\", &longest] {
            assert_eq!(check_instance(name), Ok(()), "{name:?}");
        }
        let longer = "x".repeat(MAX_BYTES + 1);
        for name in ["", " ", " a", "a ", "a\tb", "a\nb", "é", "a\u{7f}", &longer] {
            assert_eq!(check_instance(name), Err(InvalidInstance), "{name:?}");
        }
        assert_eq!(check_instance(&host_name()), Ok(()));
    }
}
