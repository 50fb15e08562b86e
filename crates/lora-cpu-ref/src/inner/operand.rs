//! Input and output of a product.

use half::{bf16, f16};

use super::{
    InnerError, Packed,
    float16::{bf16_round, bf16_to_f32, f16_to_f32},
};

/// Activations of either type.
#[derive(Clone, Copy, Debug)]
pub(super) enum Values<'a> {
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
}

/// Rows of activations: row `m` is `k` values from `place(m) * stride`, where `place(m)` is `m`
/// or the `m`-th entry of an index list. Rows may overlap, repeat and come in any order.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub(super) values: Values<'a>,
    stride: usize,
    count: usize,
    index: Option<&'a [u32]>,
}

impl<'a> Rows<'a> {
    /// The first `count` rows of `data`, `stride` elements apart.
    pub fn bf16(data: &'a [bf16], stride: usize, count: usize) -> Self {
        Self { values: Values::Bf16(data), stride, count, index: None }
    }

    /// The first `count` rows of `data`, `stride` elements apart.
    pub fn f32(data: &'a [f32], stride: usize, count: usize) -> Self {
        Self { values: Values::F32(data), stride, count, index: None }
    }

    /// Gathers the rows in `index` instead of the first ones.
    #[must_use]
    pub fn listed(self, index: &'a [u32]) -> Self {
        Self { index: Some(index), count: index.len(), ..self }
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Checks that every row has `k` values.
    pub(super) fn check(&self, k: usize) -> Result<(), InnerError> {
        let found = match self.values {
            Values::Bf16(data) => data.len(),
            Values::F32(data) => data.len(),
        };
        check_extent("x", found, self.stride, k, last_row(self.count, self.index))
    }

    /// Row `m` of `data`, which holds this operand's values; empty if it is out of bounds.
    pub(super) fn row<T>(&self, data: &'a [T], m: usize, k: usize) -> &'a [T] {
        let start = place(self.index, m).saturating_mul(self.stride);
        data.get(start..start.saturating_add(k)).unwrap_or(&[])
    }
}

/// Output of either type.
#[derive(Debug)]
pub(super) enum ValuesMut<'a> {
    Bf16(&'a mut [bf16]),
    F32(&'a mut [f32]),
}

/// Where results go: row `m` is the `n` values from `m * stride`. To write columns from `c` on, pass
/// `&mut data[c..]`.
#[derive(Debug)]
pub struct Out<'a> {
    pub(super) values: ValuesMut<'a>,
    pub(super) stride: usize,
    pub(super) bias: Option<&'a [f32]>,
}

impl<'a> Out<'a> {
    /// Rounds results to bfloat16 (nearest, ties to even) and stores them in `data`.
    pub fn bf16(data: &'a mut [bf16], stride: usize) -> Self {
        Self { values: ValuesMut::Bf16(data), stride, bias: None }
    }

    /// Stores results in `data`.
    pub fn f32(data: &'a mut [f32], stride: usize) -> Self {
        Self { values: ValuesMut::F32(data), stride, bias: None }
    }

    /// Adds `bias[n]` to output `n` before it is rounded.
    #[must_use]
    pub fn bias(self, bias: Option<&'a [f32]>) -> Self {
        Self { bias, ..self }
    }

    /// Checks that `count` rows of `w`'s outputs fit.
    pub(super) fn check(&self, count: usize, w: &Packed) -> Result<(), InnerError> {
        let width = w.n();
        let found = match &self.values {
            ValuesMut::Bf16(data) => data.len(),
            ValuesMut::F32(data) => data.len(),
        };
        if let Some(bias) = self.bias
            && bias.len() != width
        {
            return Err(InnerError::Count { what: "bias", found: bias.len(), needed: width });
        }
        if self.stride < width {
            return Err(InnerError::Overlap { stride: self.stride, width });
        }
        check_extent("the output", found, self.stride, width, count.checked_sub(1))
    }
}

/// An element type that outputs may have.
pub(super) trait Element: Copy + Send + Sync {
    /// The value as `f32`.
    fn widen(self) -> f32;
    /// `value` rounded to this type.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        bf16_to_f32(self.to_bits().into())
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        bf16_round(value)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f16_to_f32(self.to_bits().into())
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Stores `results` of the outputs from `n0` in `out`, after adding the bias.
pub(super) fn store<T: Element>(bias: Option<&[f32]>, n0: usize, results: &[f32], out: &mut [T]) {
    let pairs = out.iter_mut().zip(results);
    match bias {
        None => pairs.for_each(|(o, &y)| *o = T::narrow(y)),
        Some(bias) => {
            let bias = bias.get(n0..).unwrap_or(&[]);
            pairs.zip(bias).for_each(|((o, &y), b)| *o = T::narrow(y + b));
        }
    }
}

/// The index of row `m`; out of bounds if the list is too short.
fn place(index: Option<&[u32]>, m: usize) -> usize {
    match index {
        Some(list) => list.get(m).map_or(usize::MAX, |&row| row as usize),
        None => m,
    }
}

fn last_row(count: usize, index: Option<&[u32]>) -> Option<usize> {
    match index {
        Some(list) => list.iter().max().map(|&row| row as usize),
        None => count.checked_sub(1),
    }
}

fn check_extent(
    what: &'static str,
    found: usize,
    stride: usize,
    width: usize,
    last: Option<usize>,
) -> Result<(), InnerError> {
    let Some(row) = last else { return Ok(()) };
    let needed = row.saturating_mul(stride).saturating_add(width);
    if needed > found {
        return Err(InnerError::Short { what, row, width, stride, found, needed });
    }
    Ok(())
}
