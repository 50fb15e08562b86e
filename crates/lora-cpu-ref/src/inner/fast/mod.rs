//! The fast matrix product.
//!
//! Every output is one chain of multiply-adds over k in ascending order, whatever the number of rows, tiles
//! and threads. So a row's result has the same bits alone and in any batch, and storing partial sums
//! between blocks of k does not change them.
//!
//! The loops, outermost first: slabs of rows; panels of 16 outputs, one or two at a time, divided among
//! threads; blocks of k, so that a block of a panel stays in the L1 cache; tiles of as many rows as
//! registers have room for sums.

mod blocks;
#[cfg(target_arch = "x86_64")]
mod dot_bf16;
mod fma;

use std::ops::Range;

use self::{
    blocks::{BLOCK_K, Blocks, ToBlock},
    fma::Fma,
};
use super::{
    Isa,
    dtype::Dtype,
    operand::{Element, Out, Rows, Values, ValuesMut, store},
    packed::{LANES, Line, Packed},
    shared::{Canvas, Grid, Window},
};

/// Sums of one row and one panel.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Sums([f32; LANES]);

/// A tile of sums in registers: for one instruction set and weight type.
trait Tile: Sync {
    /// A block of one row of activations, [`BLOCK_K`] values.
    type Block: ToBlock;
    /// Maximum rows of a tile.
    fn max_rows(&self) -> usize;
    /// Maximum panels of a tile: 1 or 2.
    fn max_panels(&self) -> usize;
    /// Adds to `sums[row * weights.len() + panel]` the products of `x[row]` with `weights[panel]`.
    ///
    /// Needs 1 to `max_rows` rows, 1 to `max_panels` panels of equal length, and sums for each pair.
    fn add(&self, x: &[Self::Block], weights: &[&[Line]], sums: &mut [Sums]);
}

/// Activations processed in one pass over the weights: few enough (2 MB of bfloat16) to be read from the
/// caches for every panel, enough to make another pass over the weights cheap.
const SLAB_VALUES: usize = 1 << 20;

/// Minimum and maximum rows of a slab. With fewer, weights would not be reused enough; with more, the sums
/// of a panel would exceed the L2 cache.
const SLAB_ROWS: Range<usize> = 96..512;

/// Weight bytes times rows of one task: some microseconds of reading, compared to about one microsecond for
/// forking.
const TASK_BYTES: usize = 128 << 10;

/// Maximum rows for which reading large weights takes longer than multiplying them.
const STREAM_ROWS: usize = 8;

/// Tasks per thread, so that an interrupted thread does not delay the others.
const TASKS_PER_THREAD: usize = 4;

/// Minimum products (and weight bytes) for using several threads. Waking a thread costs 5 to 20
/// microseconds. One core does at best 10^5 products and reads 20 kB in a microsecond, so below these
/// bounds, halving the work does not pay.
const SERIAL_PRODUCTS: usize = 2 << 20;
const SERIAL_BYTES: usize = 256 << 10;

/// See [`matmul`](super::matmul), which has checked the operands.
pub(super) fn matmul(isa: Isa, x: Rows<'_>, w: &Packed, out: Out<'_>) {
    let (stride, bias) = (out.stride, out.bias);
    match out.values {
        ValuesMut::Bf16(data) => by_tile(isa, x, w, Canvas::new(data, stride), bias),
        ValuesMut::F32(data) => by_tile(isa, x, w, Canvas::new(data, stride), bias),
    }
}

/// Chooses the tile: `vdpbf16ps` if both operands are bfloat16 and the CPU has it, else `f32`.
fn by_tile<T: Element>(
    isa: Isa,
    x: Rows<'_>,
    w: &Packed,
    canvas: Canvas<'_, T>,
    bias: Option<&[f32]>,
) {
    #[cfg(target_arch = "x86_64")]
    if let (Values::Bf16(_), Dtype::Bf16) = (x.values, w.dtype())
        && let Some(tile) = dot_bf16::DotBf16::new(isa)
    {
        return slabs(&tile, x, w, canvas, bias);
    }
    slabs(&Fma::new(isa, w.dtype()), x, w, canvas, bias);
}

fn slabs<K: Tile, T: Element>(
    tile: &K,
    x: Rows<'_>,
    w: &Packed,
    mut canvas: Canvas<'_, T>,
    bias: Option<&[f32]>,
) {
    let height = (SLAB_VALUES / w.k().max(1)).clamp(SLAB_ROWS.start, SLAB_ROWS.end);
    for start in (0..x.count()).step_by(height) {
        let rows = start..x.count().min(start + height);
        let x = Blocks::<K::Block>::new(x, rows.clone(), w.k());
        let product = Product { tile, x: &x, first: rows.start, w, bias };
        product.run(&mut canvas);
    }
}

/// The product of one slab of rows with all weights.
struct Product<'a, K: Tile> {
    tile: &'a K,
    x: &'a Blocks<K::Block>,
    /// Output row of the first row of `x`.
    first: usize,
    w: &'a Packed,
    bias: Option<&'a [f32]>,
}

impl<K: Tile> Product<'_, K> {
    fn run<T: Element>(&self, canvas: &mut Canvas<'_, T>) {
        canvas.paint(self.grid(), Vec::new, |sums, window| self.window(sums, window));
    }

    /// Columns are divided into panels. Rows are divided only if there are too few panels for the threads.
    fn grid(&self) -> Grid {
        let (rows, n, k) = (self.x.rows(), self.w.n(), self.w.k());
        let col_step = LANES * self.panels();
        let cuts = n.div_ceil(col_step).max(1);
        let wanted = TASKS_PER_THREAD * rayon::current_num_threads();
        let row_step = if cuts >= wanted {
            rows
        } else {
            rows.div_ceil(wanted.div_ceil(cuts)).next_multiple_of(self.tile.max_rows())
        };
        let products = rows.saturating_mul(n).saturating_mul(k);
        let serial = products < SERIAL_PRODUCTS && self.w.bytes() < SERIAL_BYTES;
        let task_bytes = (self.w.bytes() / cuts).max(1);
        let min_task = (!serial).then_some((TASK_BYTES / task_bytes / rows.max(1)).max(1));
        Grid { rows: self.first..self.first + rows, cols: n, row_step, col_step, min_task }
    }

    /// With two panels, each value of a row is loaded once for both, which helps if arithmetic is the
    /// limit. With one panel, memory is read as one stream, which helps if bandwidth is.
    fn panels(&self) -> usize {
        let streams = self.w.bytes() >= SERIAL_BYTES && self.w.k() > BLOCK_K;
        if streams && self.x.rows() <= STREAM_ROWS { 1 } else { self.tile.max_panels() }
    }

    /// Computes one rectangle of the output.
    fn window<T: Element>(&self, sums: &mut Vec<Sums>, mut out: Window<'_, T>) {
        let (panel, panels) = (out.cols.start / LANES, out.cols.len().div_ceil(LANES));
        let weights = [self.w.panel(panel), self.w.panel(panel + 1)];
        let rows = out.rows.start - self.first..out.rows.end - self.first;
        sums.clear();
        sums.resize(rows.len() * panels, Sums([0.0; LANES]));
        let depth = BLOCK_K / self.w.dtype().depth();
        for (block, start) in (0..weights[0].len()).step_by(depth).enumerate() {
            let weights = weights.map(|lines| part(lines, start, depth));
            let x = part(self.x.block(block), rows.start, rows.len());
            for tile in tiles(rows.len(), self.tile.max_rows()) {
                let sums = &mut sums[tile.start * panels..tile.end * panels];
                self.tile.add(&x[tile], &weights[..panels], sums);
            }
        }
        for (m, sums) in out.rows.clone().zip(sums.chunks(panels)) {
            store(self.bias, out.cols.start, bytemuck::cast_slice(sums), out.row(m));
        }
    }
}

/// `count` items from `start`, or those that there are.
fn part<T>(items: &[T], start: usize, count: usize) -> &[T] {
    let items = items.get(start..).unwrap_or(&[]);
    &items[..count.min(items.len())]
}

/// Divides `rows` into tiles of `most` rows and a rest. Full tiles come first, as the first tile waits for
/// weights from memory and should have the most work to overlap.
fn tiles(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(most).map(move |start| start..rows.min(start + most))
}
