//! The numerical difference of two low-rank updates.

use rayon::prelude::*;

use crate::adapter::LowRank;
use crate::device::HostTensor;

/// Dimensions of an update.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Dims {
    /// Whether A and B have an axis of experts.
    pub stacked: bool,
    /// Number of experts; 1 if they share both matrices, and without the axis.
    pub experts: usize,
    pub output: usize,
    pub input: usize,
}

impl Dims {
    /// Those of an update; `None` if A, B and the rank do not fit each other.
    pub fn of(low: &LowRank) -> Option<Self> {
        let (stacked, a, b) = match (low.a.shape(), low.b.shape()) {
            (&[rank, input], &[output, columns]) => (false, [1, rank, input], [1, output, columns]),
            (&[x, rank, input], &[y, output, columns]) => {
                (true, [x, rank, input], [y, output, columns])
            }
            _ => return None,
        };
        let extents = a[0] == b[0] || a[0] == 1 || b[0] == 1;
        let pair = extents && a[1] == low.rank && b[2] == low.rank;
        pair.then_some(Self { stacked, experts: a[0].max(b[0]), output: b[1], input: a[2] })
    }
}

/// A and B of one expert, as windows of the stacks.
pub(super) struct Matrices {
    rank: usize,
    scale: f32,
    a: HostTensor,
    b: HostTensor,
}

impl Matrices {
    /// Those of one expert; the update has these dimensions.
    pub fn of(low: &LowRank, expert: usize, dims: Dims) -> Self {
        let matrix = |tensor: &HostTensor, shape: [usize; 2]| {
            let bytes = shape[0] * shape[1] * tensor.dtype().size();
            let start = if tensor.bytes().len() == bytes { 0 } else { expert * bytes };
            let window = tensor.bytes().slice(start..start + bytes);
            HostTensor::new(tensor.dtype(), shape.to_vec(), window)
                .unwrap_or_else(|| unreachable!("the window was made for the shape"))
        };
        Self {
            rank: low.rank,
            scale: low.scale,
            a: matrix(&low.a, [low.rank, dims.input]),
            b: matrix(&low.b, [dims.output, low.rank]),
        }
    }
}

/// A pair with A decoded, for computing many rows of the product.
struct Factors<'a> {
    pair: &'a Matrices,
    a: Vec<f32>,
}

impl<'a> Factors<'a> {
    fn of(pair: &'a Matrices) -> Self {
        Self { a: pair.a.to_f32(), pair }
    }

    /// Writes a row of `scale * B A`. Products of two f32 are exact in f64.
    fn row(&self, row: usize, out: &mut [f64]) {
        out.fill(0.0);
        for k in 0..self.pair.rank {
            let weight = f64::from(self.pair.b.get_f32(row * self.pair.rank + k));
            // In updates with stacked ranks, most of B is zero.
            if weight != 0.0 {
                let a = &self.a[k * out.len()..][..out.len()];
                out.iter_mut().zip(a).for_each(|(out, a)| *out += weight * f64::from(*a));
            }
        }
        out.iter_mut().for_each(|out| *out *= f64::from(self.pair.scale));
    }
}

/// The largest difference of two updates, and their largest element.
pub(super) struct Measured {
    pub difference: f64,
    pub largest: f64,
}

/// Multiplies out two updates and compares them; an absent one is zero. `None` if they are bitwise equal.
pub(super) fn measure(
    one: Option<&Matrices>,
    two: Option<&Matrices>,
    dims: Dims,
) -> Option<Measured> {
    if let (Some(one), Some(two)) = (one, two)
        && (one.scale.to_bits(), &one.a, &one.b) == (two.scale.to_bits(), &two.a, &two.b)
    {
        return None;
    }
    let pairs = [one, two].map(|pair| pair.map(Factors::of));
    let rows = (0..dims.output).into_par_iter().map_init(
        || [vec![0.0; dims.input], vec![0.0; dims.input]],
        |buffers, row| {
            for (factors, buffer) in pairs.iter().zip(buffers.iter_mut()) {
                if let Some(factors) = factors {
                    factors.row(row, buffer);
                }
            }
            let [one, two] = buffers;
            one.iter().zip(two).fold((0.0, 0.0), |worst, (one, two)| {
                larger(worst, ((*one - *two).abs(), one.abs().max(two.abs())))
            })
        },
    );
    let (difference, largest) = rows.reduce(|| (0.0, 0.0), larger);
    Some(Measured { difference, largest })
}

/// Elementwise maximum; NaN counts as infinity.
fn larger(one: (f64, f64), two: (f64, f64)) -> (f64, f64) {
    let larger = |one: f64, two: f64| if two.is_nan() { f64::INFINITY } else { one.max(two) };
    (larger(one.0, two.0), larger(one.1, two.1))
}
