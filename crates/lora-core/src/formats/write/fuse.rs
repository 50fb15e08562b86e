//! Merges several low-rank updates of the same input into one.

use super::stack::{Rows, Stack};
use super::{WriteError, inexpressible};
use crate::adapter::LowRank;
use crate::modules::SiteKey;

/// A low-rank update whose matrices are built when they are written: A `[experts, rank, in]`,
/// B `[experts, out, rank]`.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub rank: usize,
    pub scale: f32,
    pub a: Stack,
    pub b: Stack,
}

impl Pair {
    /// An update, unchanged.
    pub fn of(low: &LowRank) -> Self {
        Self { rank: low.rank, scale: low.scale, a: Stack::of(&low.a), b: Stack::of(&low.b) }
    }

    /// Repeats shared matrices for each of `count` experts.
    pub fn for_experts(self, count: usize) -> Self {
        Self { a: self.a.for_experts(count), b: self.b.for_experts(count), ..self }
    }
}

/// A module that contributes rows to a fused one.
pub(super) struct Member<'a> {
    pub key: SiteKey,
    pub low: &'a LowRank,
    /// The places of B's rows in the fused B.
    pub rows: Vec<Rows>,
}

/// The fused update of all members; rows of B that no member has are zero.
///
/// If all members have the same A, it is shared. Otherwise their ranks are stacked, which does not change the
/// products: `[B1 0; 0 B2] [A1; A2] = [B1 A1; B2 A2]`.
///
/// # Errors
/// Members with different scales, element types or input sizes.
pub(super) fn fuse(
    members: &[Member<'_>],
    experts: usize,
    output: usize,
) -> Result<Option<Pair>, WriteError> {
    let Some((first, others)) = members.split_first() else { return Ok(None) };
    for other in others {
        require_alike(first, other)?;
    }
    let shared = others.iter().all(|other| other.low.a == first.low.a);
    let rank =
        if shared { first.low.rank } else { members.iter().map(|member| member.low.rank).sum() };
    let (dtype, input) = (first.low.a.dtype(), input(first.low));
    let mut a = Stack::zeros(dtype, [experts, rank, input]);
    let mut b = Stack::zeros(dtype, [experts, output, rank]);
    let mut column = 0;
    for (nth, Member { low, rows, .. }) in members.iter().enumerate() {
        if nth == 0 || !shared {
            a.place(&low.a, Rows::together(low.rank, column), 0);
        }
        for rows in rows {
            b.place(&low.b, rows.clone(), column);
        }
        if !shared {
            column += low.rank;
        }
    }
    Ok(Some(Pair { rank, scale: first.low.scale, a, b }))
}

fn input(low: &LowRank) -> usize {
    low.a.shape().last().copied().unwrap_or(0)
}

fn require_alike(first: &Member<'_>, other: &Member<'_>) -> Result<(), WriteError> {
    let differ = |found: [String; 2], allowed: &str, remedy: &str| {
        let [one, two] = found;
        let found = format!("{one} beside {two}");
        inexpressible(&format!("{} and {}", first.key, other.key), found, allowed, remedy)
    };
    let apart = "choose a layout that keeps the modules apart";
    let (one, two) = (first.low, other.low);
    if one.scale.to_bits() != two.scale.to_bits() {
        let found = [one, two].map(|low| format!("scale {}", low.scale));
        return Err(differ(found, "one scale for modules that become one", apart));
    }
    if one.a.dtype() != two.a.dtype() {
        let found = [one, two].map(|low| low.a.dtype().to_string());
        return Err(differ(found, "one element type for modules that become one", apart));
    }
    if input(one) != input(two) {
        let found = [one, two].map(|low| format!("{} inputs", input(low)));
        let remedy = "load the adapter on the model that it was trained for";
        return Err(differ(found, "modules over the same input", remedy));
    }
    Ok(())
}
