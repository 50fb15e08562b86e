//! Weights packed in the order in which the fast product reads them.

use rayon::prelude::*;

use super::{
    dtype::Dtype,
    error::InnerError,
    float16::{bf16_to_f32, f16_to_f32},
};

/// Outputs of a panel, which is also the number of f32 in a vector register.
pub(super) const LANES: usize = 16;

/// Lines packed by one task: enough to outweigh its overhead, few enough to balance the load.
const PACK_LINES: usize = 4096;

/// Lines packed at a time: 8 kB.
const STRETCH: usize = 128;

/// Row-major weights `[rows, k]` to be packed: little-endian bytes, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Outputs of this part.
    pub rows: usize,
    /// `rows * k` elements.
    pub bytes: &'a [u8],
}

/// One cache line: for each of 16 outputs, one `f32` or two 16-bit values (the earlier k in the
/// lower half), which is the operand of `vdpbf16ps`.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

/// A weight matrix `[n, k]` (a linear layer's `[out_features, in_features]`) packed for
/// [`matmul`](super::matmul), values unchanged and in their stored type.
///
/// Layout: panels of 16 outputs, the last one padded with zeros. A panel has one line of 64 bytes for every k
/// (`f32`) or for every two k (16-bit types), in order, so it is read as one stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    n: usize,
    k: usize,
    dtype: Dtype,
    lines: Box<[Line]>,
}

impl Packed {
    /// Packs `parts` stacked along n, such as q, k and v of a layer.
    ///
    /// Each part is `[rows, k]`. Runs in the caller's rayon pool and allocates only the result.
    /// No parts give a matrix without outputs (and `f32` as its type).
    ///
    /// # Errors
    /// [`InnerError::PartBytes`], [`InnerError::PartDtype`] and [`InnerError::TooLarge`].
    pub fn pack(parts: &[Part<'_>], k: usize) -> Result<Self, InnerError> {
        let dtype = parts.first().map_or(Dtype::F32, |p| p.dtype);
        check_parts(parts, k, dtype)?;
        let n = parts.iter().try_fold(0usize, |n, p| n.checked_add(p.rows));
        let n = n.ok_or(InnerError::TooLarge { n: usize::MAX, k })?;
        let per_panel = k.div_ceil(dtype.depth());
        let total = usize::div_ceil(n, LANES)
            .checked_mul(per_panel)
            .filter(|lines| lines.checked_mul(size_of::<Line>()).is_some())
            .ok_or(InnerError::TooLarge { n, k })?;
        let mut lines = bytemuck::allocation::try_zeroed_slice_box(total)
            .map_err(|()| InnerError::TooLarge { n, k })?;
        if per_panel > 0 {
            lines
                .par_chunks_mut(per_panel)
                .with_min_len((PACK_LINES / per_panel).max(1))
                .enumerate()
                .for_each(|(panel, out)| pack_panel(parts, k, panel * LANES, out));
        }
        Ok(Self { n, k, dtype, lines })
    }

    /// Outputs (rows of the weight matrix).
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs (columns of the weight matrix).
    pub fn k(&self) -> usize {
        self.k
    }

    /// Type in which the weights are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of memory held, padding included.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    /// Writes row `n` of the weights to `out` as `f32` (exact), for embedding lookups and row norms. Values
    /// beyond the shorter of k and `out` are not changed. Returns false, without any change, if there is no
    /// such row.
    pub fn decode_row(&self, n: usize, out: &mut [f32]) -> bool {
        if n >= self.n {
            return false;
        }
        let (lines, lane) = (self.panel(n / LANES), n % LANES);
        let words = lines.iter().map(|line| line.0[lane]);
        let used = out.len().min(self.k);
        let out = &mut out[..used];
        match self.dtype {
            Dtype::F32 => out.iter_mut().zip(words).for_each(|(o, w)| *o = f32::from_bits(w)),
            Dtype::Bf16 => decode_pairs(out, words, bf16_to_f32),
            Dtype::F16 => decode_pairs(out, words, f16_to_f32),
        }
        true
    }

    /// Lines of one panel, in order of k; none if there is no such panel.
    pub(super) fn panel(&self, index: usize) -> &[Line] {
        let per_panel = self.k.div_ceil(self.dtype.depth());
        self.lines.get(index * per_panel..(index + 1) * per_panel).unwrap_or(&[])
    }
}

fn check_parts(parts: &[Part<'_>], k: usize, dtype: Dtype) -> Result<(), InnerError> {
    for (part, p) in parts.iter().enumerate() {
        if p.dtype != dtype {
            return Err(InnerError::PartDtype { part, found: p.dtype, needed: dtype });
        }
        let needed = p.rows.checked_mul(k).and_then(|e| e.checked_mul(dtype.size()));
        let needed = needed.ok_or(InnerError::TooLarge { n: p.rows, k })?;
        if p.bytes.len() != needed {
            let (rows, found) = (p.rows, p.bytes.len());
            return Err(InnerError::PartBytes { part, rows, k, dtype, found, needed });
        }
    }
    Ok(())
}

/// Fills the lines of the panel that starts at output `first`. It proceeds in stretches, so that the lines
/// stay in the L1 cache while the words of each row are inserted.
fn pack_panel(parts: &[Part<'_>], k: usize, first: usize, out: &mut [Line]) {
    let rows: [_; LANES] =
        std::array::from_fn(|lane| source_row(parts, k, first + lane).unwrap_or(&[]));
    for (stretch, lines) in out.chunks_mut(STRETCH).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            let (words, rest) = row.get(stretch * STRETCH * 4..).unwrap_or(&[]).as_chunks::<4>();
            for (line, word) in lines.iter_mut().zip(words) {
                line.0[lane] = u32::from_le_bytes(*word);
            }
            // An odd k of a 16-bit type leaves half a word.
            if let (Some(line), [low, high]) = (lines.get_mut(words.len()), rest) {
                line.0[lane] = u16::from_le_bytes([*low, *high]).into();
            }
        }
    }
}

/// Bytes of output `n` in the part that holds it; none for padding.
fn source_row<'a>(parts: &[Part<'a>], k: usize, mut n: usize) -> Option<&'a [u8]> {
    for part in parts {
        if n < part.rows {
            let width = k * part.dtype.size();
            return part.bytes.get(n * width..(n + 1) * width);
        }
        n -= part.rows;
    }
    None
}

fn decode_pairs(out: &mut [f32], words: impl Iterator<Item = u32>, decode: impl Fn(u32) -> f32) {
    for (pair, word) in out.chunks_mut(2).zip(words) {
        for (value, bits) in pair.iter_mut().zip([word & 0xffff, word >> 16]) {
            *value = decode(bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
    }

    #[test]
    fn rows_of_fused_parts_come_back_in_order() {
        let (a, b) = (bytes(&[1.0, 2.0, 3.0]), bytes(&[4.0, 5.0, 6.0, 7.0, 8.0, 9.0]));
        let part = |rows, bytes| Part { dtype: Dtype::Bf16, rows, bytes };
        let packed = Packed::pack(&[part(1, &a), part(0, &[]), part(2, &b)], 3).unwrap();
        assert_eq!((packed.n(), packed.k(), packed.bytes()), (3, 3, 128));
        let mut row = [0.0; 3];
        assert!(packed.decode_row(2, &mut row));
        assert_eq!(row, [7.0, 8.0, 9.0]);
        assert!(!packed.decode_row(3, &mut row));
    }

    #[test]
    fn a_part_of_the_wrong_size_or_type_is_refused() {
        let part = Part { dtype: Dtype::Bf16, rows: 2, bytes: &[0; 6] };
        let error = Packed::pack(&[part], 2).unwrap_err();
        assert!(error.to_string().contains("6 bytes"), "{error}");
        let other = Part { dtype: Dtype::F16, rows: 1, bytes: &[0; 6] };
        let first = Part { dtype: Dtype::Bf16, rows: 1, bytes: &[0; 6] };
        assert!(matches!(
            Packed::pack(&[first, other], 3),
            Err(InnerError::PartDtype { part: 1, .. })
        ));
    }
}
