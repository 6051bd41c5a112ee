//! Facts about the machine that the CPU backends compute on, where Linux tells them.

use std::fs;
use std::thread;

/// Processor, for people: `AMD EPYC 7763, 8 threads`.
pub fn cpu() -> String {
    let name = read_field("/proc/cpuinfo", "model name").unwrap_or_else(|| "CPU".to_owned());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let plural = if threads == 1 { "" } else { "s" };
    format!("{name}, {threads} thread{plural}")
}

/// Memory of the machine, in bytes.
pub fn memory() -> Option<u64> {
    kibibytes(&read_field("/proc/meminfo", "MemTotal")?)
}

/// The value of a `name: value` line of a file in `/proc`.
fn read_field(path: &str, name: &str) -> Option<String> {
    field(&fs::read_to_string(path).ok()?, name)
}

fn field(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

/// `123 kB`, which means KiB in `/proc`, in bytes.
fn kibibytes(value: &str) -> Option<u64> {
    let count: u64 = value.strip_suffix(" kB")?.parse().ok()?;
    count.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_are_found() {
        let text = "processor\t: 0\nmodel name\t: AMD EPYC 7763: rev 2\nVmHWM:\t    1672 kB\n";
        assert_eq!(
            field(text, "model name").as_deref(),
            Some("AMD EPYC 7763: rev 2")
        );
        assert_eq!(
            field(text, "VmHWM").as_deref().and_then(kibibytes),
            Some(1672 * 1024)
        );
        assert_eq!(field(text, "VmRSS"), None);
        assert_eq!(kibibytes("1672"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells_the_memory() {
        assert!(memory() > Some(64 << 20));
        assert!(cpu().contains(" thread"));
    }
}
