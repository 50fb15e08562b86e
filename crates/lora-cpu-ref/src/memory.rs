//! The available memory of the machine.

use sysinfo::System;

/// Bytes that can be allocated without swapping, within the limit of the container if there is one; `None` if
/// the system does not report it.
pub fn available() -> Option<usize> {
    let mut system = System::new();
    system.refresh_memory();
    // Without this, `cgroup_limits` panics.
    if system.total_memory() == 0 {
        return None;
    }
    let free = system.available_memory();
    // The page cache of a container is reclaimed on demand, so only `rss` counts as used.
    let in_container =
        system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
    let free = in_container.map_or(free, |limit| limit.min(free));
    // Zero if the system does not report it.
    usize::try_from(free).ok().filter(|free| *free > 0)
}
