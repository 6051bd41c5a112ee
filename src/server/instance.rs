//! The name of a server among others.

/// The machine's host name, which Kubernetes sets to the pod's name; `kiln` if there is none.
pub(crate) fn host_name() -> String {
    #[cfg(unix)]
    {
        let name = rustix::system::uname();
        let name = name.nodename().to_string_lossy();
        let is_usable = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
        if is_usable {
            return name.into_owned();
        }
    }
    "kiln".to_owned()
}
