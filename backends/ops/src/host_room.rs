//! Memory that this process can still allocate on the host: what the machine, the control groups and
//! the process's own limits leave. Reads Linux's `/proc` and `/sys/fs/cgroup`.

use std::fs;
use std::path::Path;

use crate::MemoryRoom;
use crate::host::{field, kibibytes};

/// Where systems mount control groups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// One limit of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bound {
    /// Bytes below the limit.
    free: u64,
    /// Bytes below the limit if this program were the only one.
    total: u64,
}

impl Bound {
    /// A limit that `used` counts against, of which this process has `own`.
    fn new(limit: u64, used: u64, own: u64) -> Self {
        Self {
            free: limit.saturating_sub(used),
            total: limit.saturating_sub(own),
        }
    }
}

/// The smallest of all limits; `None` without `/proc`.
pub(crate) fn room() -> Option<MemoryRoom> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let own = of(&status, "RssAnon").unwrap_or(0);
    let mut bounds: Vec<Bound> = machine(&meminfo, own).into_iter().collect();
    if let Ok(limits) = fs::read_to_string("/proc/self/limits") {
        let sizes = [("Max address space", "VmSize"), ("Max data size", "VmData")];
        bounds.extend(sizes.iter().filter_map(|(limit, used)| {
            let used = of(&status, used)?;
            Some(Bound::new(soft_limit(&limits, limit)?, used, used))
        }));
    }
    if let Ok(groups) = fs::read_to_string("/proc/self/cgroup") {
        bounds.extend(control_groups(Path::new(CGROUPS), &groups, own));
    }
    let free = bounds.iter().map(|bound| bound.free).min()?;
    let total = bounds.iter().map(|bound| bound.total).min()?;
    Some(MemoryRoom {
        free,
        total: total.max(free),
    })
}

/// A field of `/proc/self/status` or `/proc/meminfo`, in bytes.
fn of(text: &str, name: &str) -> Option<u64> {
    kibibytes(&field(text, name)?)
}

/// The machine's memory, swap included: a process ends only when both are full.
fn machine(meminfo: &str, own: u64) -> Option<Bound> {
    let swap = |name| of(meminfo, name).unwrap_or(0);
    let available = of(meminfo, "MemAvailable")? + swap("SwapFree");
    let limit = of(meminfo, "MemTotal")? + swap("SwapTotal");
    Some(Bound {
        free: available,
        total: limit.saturating_sub(own),
    })
}

/// A soft limit of `/proc/self/limits`; `None` if it is unlimited.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The memory limits of the control groups that this process is in, and of those above them.
fn control_groups(mount: &Path, groups: &str, own: u64) -> Vec<Bound> {
    let mut bounds = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        // Version 2 has one hierarchy for all controllers, version 1 one for the memory controller.
        let (mount, limits, usage, cached) = if controllers.is_empty() {
            let limits = ["memory.max", "memory.high"].as_slice();
            let cached = ["active_file", "inactive_file"];
            (mount.to_owned(), limits, "memory.current", cached)
        } else if controllers.split(',').any(|name| name == "memory") {
            let limits = ["memory.limit_in_bytes"].as_slice();
            let cached = ["total_active_file", "total_inactive_file"];
            let mount = mount.join("memory");
            (mount, limits, "memory.usage_in_bytes", cached)
        } else {
            continue;
        };
        // In a container the mount may begin at the process's own group, below `path`.
        let path = mount.join(path.trim_start_matches('/'));
        for group in path.ancestors().take_while(|it| it.starts_with(&mount)) {
            let limits = limits.iter().filter_map(|name| number(&group.join(name)));
            let (Some(limit), Some(used)) = (limits.min(), number(&group.join(usage))) else {
                continue;
            };
            // The system frees the pages of files, weights among them, before it refuses memory.
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let cached = cached.iter().filter_map(|name| entry(&stat, name)).sum();
            bounds.push(Bound::new(limit, used.saturating_sub(cached), own));
        }
    }
    bounds
}

/// The number in a file; `None` for `max`.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// An entry of `memory.stat`: a name, a space and a number.
fn entry(stat: &str, name: &str) -> Option<u64> {
    let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name)?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A folder of this test with the given files.
    fn tree(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kiln-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn every_control_group_above_the_process_limits_it() {
        let mount = tree(
            "v2",
            &[
                ("pod/memory.max", "1048576000\n"),
                ("pod/memory.high", "max\n"),
                ("pod/memory.current", "104857600\n"),
                (
                    "pod/memory.stat",
                    "anon 5\nactive_file 1048576\ninactive_file 2097152\n",
                ),
                ("pod/box/memory.max", "max\n"),
                ("pod/box/memory.high", "524288000\n"),
                ("pod/box/memory.current", "73400320\n"),
            ],
        );
        let bounds = control_groups(&mount, "0::/pod/box\n", 10 * MIB);
        fs::remove_dir_all(&mount).unwrap();
        assert_eq!(
            bounds,
            [
                Bound::new(500 * MIB, 70 * MIB, 10 * MIB),
                // Without the pages of files.
                Bound::new(1000 * MIB, 97 * MIB, 10 * MIB),
            ]
        );
    }

    #[test]
    fn a_mount_that_begins_at_the_process_group_is_read() {
        let mount = tree(
            "v1",
            &[
                ("memory/memory.limit_in_bytes", "104857600\n"),
                ("memory/memory.usage_in_bytes", "52428800\n"),
                ("memory/memory.stat", "total_inactive_file 1048576\n"),
            ],
        );
        let groups = "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n";
        let bounds = control_groups(&mount, groups, 0);
        fs::remove_dir_all(&mount).unwrap();
        assert_eq!(bounds, [Bound::new(100 * MIB, 49 * MIB, 0)]);
    }

    #[test]
    fn limits_of_the_process_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max data size             unlimited            unlimited            bytes\n\
                      Max address space         614400000            unlimited            bytes\n";
        assert_eq!(soft_limit(limits, "Max address space"), Some(614_400_000));
        assert_eq!(soft_limit(limits, "Max data size"), None);
    }

    #[test]
    fn swap_counts_as_memory_of_the_machine() {
        let meminfo = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n\
                       SwapTotal: 100 kB\nSwapFree: 50 kB\n";
        let bound = Bound {
            free: 450 * 1024,
            total: 1000 * 1024,
        };
        assert_eq!(machine(meminfo, 100 * 1024), Some(bound));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn allocated_memory_is_not_free() {
        const BYTES: usize = 256 << 20;
        let before = room().unwrap();
        let held = std::hint::black_box(vec![1_u8; BYTES]);
        let during = room().unwrap();
        drop(held);
        assert!(before.total >= before.free);
        // Other programs of the machine free and allocate memory meanwhile.
        assert!(during.free < before.free);
    }
}
