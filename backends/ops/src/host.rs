//! Facts about the machine that the CPU backends compute on, where Linux tells them.

use std::fs;
use std::thread;

use crate::MemoryUse;

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

/// Memory that this process holds, and the most it held at once.
#[cfg_attr(
    not(any(feature = "flex", feature = "ndarray")),
    expect(dead_code, reason = "of the CPU backends")
)]
pub(crate) fn process_memory() -> MemoryUse {
    let status = |name| kibibytes(&read_field("/proc/self/status", name)?);
    MemoryUse {
        in_use: status("VmRSS"),
        reserved: None,
        peak: status("VmHWM"),
    }
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

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_remembers_what_was_let_go_of() {
        const BYTES: usize = 96 << 20;
        let before = process_memory();
        let held = std::hint::black_box(vec![1_u8; BYTES]);
        let during = process_memory();
        drop(held);
        let after = process_memory();
        assert!(during.in_use >= before.in_use.map(|bytes| bytes + (BYTES / 2) as u64));
        // Linux counts with an error of some pages for each thread.
        assert!(after.peak.map(|bytes| bytes + (8 << 20)) >= during.in_use);
        assert!(after.in_use < during.in_use);
    }
}
