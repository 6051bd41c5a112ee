//! Processor and memory of the host, which the CPU backends compute on. Reads Linux's `/proc`.

use std::fs;
use std::thread;

use crate::MemoryUse;

/// Human-readable name of the processor: `AMD EPYC 7763, 8 threads`.
pub fn cpu() -> String {
    let name = read_field("/proc/cpuinfo", "model name").unwrap_or_else(|| "CPU".to_owned());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let plural = if threads == 1 { "" } else { "s" };
    format!("{name}, {threads} thread{plural}")
}

/// Memory of the host in bytes; `None` without `/proc`.
pub fn memory() -> Option<u64> {
    kibibytes(&read_field("/proc/meminfo", "MemTotal")?)
}

/// Resident memory of this process, and its peak.
#[cfg_attr(
    not(any(feature = "flex", feature = "ndarray")),
    expect(dead_code, reason = "only the CPU backends use it")
)]
pub(crate) fn process_memory() -> MemoryUse {
    let status = |name| kibibytes(&read_field("/proc/self/status", name)?);
    MemoryUse {
        in_use: status("VmRSS"),
        reserved: None,
        peak: status("VmHWM"),
    }
}

/// Reads the value of the `name: value` line of a file in `/proc`.
fn read_field(path: &str, name: &str) -> Option<String> {
    field(&fs::read_to_string(path).ok()?, name)
}

pub(crate) fn field(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

/// Converts `123 kB` to bytes; `/proc` writes kB for KiB.
pub(crate) fn kibibytes(value: &str) -> Option<u64> {
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
    fn linux_reports_memory_and_processor() {
        assert!(memory() > Some(64 << 20));
        assert!(cpu().contains(" thread"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_includes_freed_memory() {
        const BYTES: usize = 96 << 20;
        let before = process_memory();
        let held = std::hint::black_box(vec![1_u8; BYTES]);
        let during = process_memory();
        drop(held);
        let after = process_memory();
        assert!(during.in_use >= before.in_use.map(|bytes| bytes + (BYTES / 2) as u64));
        // Linux's counters are off by some pages per thread.
        assert!(after.peak.map(|bytes| bytes + (8 << 20)) >= during.in_use);
        assert!(after.in_use < during.in_use);
    }
}
