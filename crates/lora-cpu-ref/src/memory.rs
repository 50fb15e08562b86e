//! How much memory the machine can still give.

use sysinfo::System;

/// Bytes that programs can still take without swapping, within the limit of the container if there is
/// one; `None` where the system does not tell.
pub fn available() -> Option<usize> {
    let mut system = System::new();
    system.refresh_memory();
    // Without this, `cgroup_limits` panics.
    if system.total_memory() == 0 {
        return None;
    }
    let free = system.available_memory();
    // What a container's page cache holds is given back on demand, so only `rss` counts as taken.
    let in_container =
        system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
    let free = in_container.map_or(free, |limit| limit.min(free));
    // Zero where the system does not tell.
    usize::try_from(free).ok().filter(|free| *free > 0)
}
