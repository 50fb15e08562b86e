//! Checks that every writer makes before it writes.

use super::{WriteError, inexpressible};
use crate::adapter::{Adapter, LowRank};
use crate::modules::{SiteKey, TargetModule};

/// Checks that every pair is consistent: A `[rank, in]` and B `[out, rank]` (with a leading axis of experts
/// on routed experts), of the same float type, with a finite scale.
///
/// # Errors
/// The first inconsistent pair.
pub(super) fn consistent(adapter: &Adapter) -> Result<(), WriteError> {
    for (key, low) in adapter.low_ranks() {
        if !fits(key, low) {
            return Err(inexpressible(
                &key,
                format!("rank {}, A {:?}, B {:?}", low.rank, low.a.shape(), low.b.shape()),
                "A [rank, in] and B [out, rank], on routed experts A [experts, rank, in] and \
                 B [experts, out, rank]",
                "export the adapter again",
            ));
        }
        if low.a.dtype() != low.b.dtype() || !low.a.dtype().is_float() || !low.scale.is_finite() {
            return Err(inexpressible(
                &key,
                format!("A {}, B {}, scale {}", low.a.dtype(), low.b.dtype(), low.scale),
                "one floating-point type for A and B, and a finite scale",
                "convert the adapter's tensors to one type",
            ));
        }
    }
    Ok(())
}

fn fits(key: SiteKey, low: &LowRank) -> bool {
    let experts = key.module().is_some_and(TargetModule::is_routed_expert);
    match (low.a.shape(), low.b.shape()) {
        (&[rank, input], &[output, columns]) if !experts => {
            rank == low.rank && columns == rank && rank * input * output > 0
        }
        (&[a, rank, input], &[b, output, columns]) if experts => {
            let extents = a == b || a == 1 || b == 1;
            let filled = rank * input * output * a * b > 0;
            extents && rank == low.rank && columns == rank && filled
        }
        _ => false,
    }
}
