//! Comparison of results with expected ones.

use crate::Case;

/// `|a - b| / |b|` in the Euclidean norm.
///
/// # Panics
/// If the lengths differ.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
    };
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (difference / norm(&mut expected.iter().copied())) as f32
}

/// Checks that tokens equal the expected ones up to the first step whose margin is below `tie`. From there
/// on, the texts may differ by rounding.
///
/// # Panics
/// If they do not.
pub fn assert_greedy(name: &str, found: &[u32], expected: &[u32], margin: &[f32], tie: f32) {
    let sure = margin.iter().position(|m| *m < tie).unwrap_or(expected.len());
    assert!(found.len() >= sure, "{name}: {} tokens, {sure} expected at least", found.len());
    assert_eq!(found[..sure], expected[..sure], "{name}: tokens differ before any tie");
}

impl Case {
    /// As [`assert_greedy`] for this case.
    pub fn assert_greedy(&self, found: &[u32], tie: f32) {
        assert_greedy(&self.id, found, &self.greedy, &self.margin, tie);
    }
}
