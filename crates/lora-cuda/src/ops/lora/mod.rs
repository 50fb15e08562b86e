//! What adapters add to the output of a base layer.
#![allow(unsafe_code)]

pub mod plan;
pub mod rows;
pub mod shrink;
pub mod table;

use std::ops::Range;

use lora_core::lora::{LoraPlan, LoraSite, SiteKind, SiteSpec};
use lora_core::{DType, Error, MatLayout, Result, check, check_extent};

use self::plan::{CudaLoraPlan, Spread};
use self::rows::SiteInput;
use self::table::Work;
use crate::args::{Address, Kernel, KernelArgs, MatArg};
use crate::device::is_aligned;
use crate::memory::queue::Launch;
use crate::ops::linear::CudaLinear;
use crate::ops::linear::tiles::Adapters;
use crate::ops::linear::{stream, tiles};
use crate::ops::{ROW_THREADS, WARP};
use crate::{Cuda, CudaQueue, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct LoraArgs {
    pub x: MatArg,
    out: MatArg,
    ids: Address,
    pub table: Address,
    pub order: Address,
    pub starts: Address,
    pub slots: Address,
    idle: Address,
    tiles: Address,
    pub sizes: Address,
    columns: Address,
    pub z: Address,
    inputs: Address,
    pub slices: i32,
    pub max_rank: i32,
    pub in_dim: i32,
    chunk: i32,
    partials: i32,
    tile_rows: i32,
}

// SAFETY: laid out as `LoraArgs` of `lora.cuh`.
unsafe impl KernelArgs for LoraArgs {
    const KERNELS: &'static [Kernel] = &[
        Kernel::LoraShrink,
        Kernel::LoraExpand,
        Kernel::LoraShrinkMma,
        Kernel::LoraExpandMma8,
        Kernel::LoraExpandMma32,
        Kernel::LoraBeginMma8,
        Kernel::LoraBeginMma32,
    ];
}

/// The adapters of a site for a batch of few rows, which the shrink has seen before.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FewRows {
    table: Address,
    order: Address,
    tiles: Address,
    sizes: Address,
    z: Address,
    starts: [i32; MAX_SLICES],
    slices: i32,
    max_rank: i32,
    partials: i32,
    inputs: Address,
}

/// Slices of a site whose adapters the product of few rows adds, and what their widths are multiples of.
const MAX_SLICES: usize = 4;
const SLICE_STEP: usize = 64;

impl FewRows {
    /// No adapters.
    pub const NONE: Self = Self {
        table: 0,
        order: 0,
        tiles: 0,
        sizes: 0,
        z: 0,
        starts: [0; MAX_SLICES],
        slices: 0,
        max_rank: 0,
        partials: 0,
        inputs: 0,
    };

    /// The adapters that `args` names; `None` if the site's slices are not as the kernel takes them.
    fn new(args: &LoraArgs, spec: &SiteSpec) -> Option<Self> {
        let even = |columns: &Range<usize>| columns.end.is_multiple_of(SLICE_STEP);
        let suited = spec.slices.len() <= MAX_SLICES && spec.slices.iter().all(even);
        let starts = starts_of(spec);
        let LoraArgs { table, order, tiles, sizes, z, inputs, slices, max_rank, partials, .. } =
            *args;
        suited.then_some(Self {
            table,
            order,
            tiles,
            sizes,
            z,
            starts,
            slices,
            max_rank,
            partials,
            inputs,
        })
    }

    /// How many slices the site has; 0 where there are no adapters.
    pub fn slices(&self) -> usize {
        self.slices as usize
    }
}

/// Rows of a tile of many rows.
const LARGE_TILE: usize = 32;

/// Rows from which on, in such tiles, a shrink as products of many rows want it is the faster one.
const MIN_ROWS_TO_SHRINK: usize = 512;

/// Where the slices of a site begin, and its end in the places of those that it has not.
pub fn starts_of<const N: usize>(spec: &SiteSpec) -> [i32; N] {
    let of = |i: usize| spec.slices.get(i).map_or(spec.out_dim(), |columns| columns.start);
    std::array::from_fn(|i| of(i) as i32)
}

/// Rows and threads of a block of the shrink of few rows, as in `lora_mma.cu`.
const SHRINK_ROWS: usize = 8;
const SHRINK_THREADS: usize = 128;

/// Ranks of a tile of the shrink, and outputs of a block of the expand, as in `lora_mma.cu`.
pub const RANKS: usize = 16;
const OUTPUTS: usize = 512;

/// Blocks of the expand that keep a device busy.
const EXPAND_BLOCKS: usize = 2048;

/// Tiles of rows times sixteens of ranks that the product of few rows expands while it multiplies a tile of
/// weights, and outputs of which its blocks have a tile each.
const MAX_PIECES: usize = 16;
const ONE_TILE_EACH: usize = 8448;

/// The largest rank of `lora_mma.cu`.
const MMA_MAX_RANK: usize = 256;

/// Columns of K that one block of the shrink sums: small enough to give every multiprocessor work,
/// large enough that partials are few. It depends on the site alone, as does how a row is summed by these
/// kernels; from [`MIN_ROWS_TO_SHRINK`] rows on another one sums, and cuts by rows and adapters, too.
fn chunk(in_dim: usize) -> usize {
    const MAX_PLANES: usize = 16;
    const LEAST: usize = 512;
    in_dim.div_ceil(MAX_PLANES).next_multiple_of(WARP).max(LEAST)
}

/// The two products of a batch at a site.
struct Plan {
    args: LoraArgs,
    /// Rows of a tile where tensor cores do the work.
    by_mma: Option<usize>,
    rows: usize,
    segments: usize,
    tiles: usize,
    slices: usize,
    max_rank: usize,
    partials: usize,
    widest: usize,
    /// What the product of few rows adds by itself, if it can.
    of_rows: Option<FewRows>,
    /// Whether what adapters add may come before the base layer's output.
    may_begin: bool,
    /// Whether products of many rows take the adapters in.
    by_tiles: bool,
}

/// Whether the product of few rows multiplies a tile of weights no faster than it prepares what adapters add to the
/// next. Outputs of which each block has one tile are over before that matters.
fn expand_is_hidden(tiles: usize, max_rank: usize, outputs: usize) -> bool {
    tiles * max_rank.div_ceil(RANKS) <= MAX_PIECES || outputs <= ONE_TILE_EACH
}

/// What an expand finds in the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Output {
    /// The base layer's.
    AddTo,
    /// Nothing yet: the base layer's is added later.
    Begin,
}

/// Checks input and output of a linear site.
fn check_linear(x: &View<'_>, site: &LoraSite<Cuda>, out: &ViewMut<'_>) -> Result<()> {
    const OP: &str = "lora_add";
    check::site_output::<Cuda>(OP, &site.spec, SiteKind::Linear, out.layout)?;
    check::float(OP, "x", x.layout.dtype)?;
    check_extent(OP, "columns of x", x.layout.cols, site.spec.in_dim)?;
    check_extent(OP, "rows of out", out.layout.rows, x.layout.rows)
}

impl Cuda {
    /// See [`lora_core::Backend::lora_add`].
    pub(crate) fn add_lora(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        check_linear(&x, site, out)?;
        self.replace_rows("lora_add", q, SiteInput::Matrix(x.into()), site, batch, out)?;
        self.apply("lora_add", q, (x.into(), x.layout, 0), site, batch, out)
    }

    /// See [`lora_core::Backend::lora_embed`].
    pub(crate) fn add_lora_rows(
        &self,
        q: &mut CudaQueue,
        ids: View<'_>,
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        const OP: &str = "lora_embed";
        check::site_output::<Self>(OP, &site.spec, SiteKind::Embedding, out.layout)?;
        check_extent(OP, "rows of out", out.layout.rows, check::id_row(OP, "ids", ids.layout)?)?;
        self.check_ids(q, [OP, "token id"], ids, site.spec.in_dim)?;
        let address = MatArg::from(ids).data();
        self.replace_rows(OP, q, SiteInput::Ids(address), site, batch, out)?;
        self.apply(OP, q, (MatArg::NONE, ids.layout, address), site, batch, out)
    }

    fn apply(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        (x, x_geo, ids): (MatArg, MatLayout, Address),
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let Some(plan) = self.plan(op, q, (x, x_geo, ids), site, batch, out)? else {
            return Ok(());
        };
        self.shrink(q, &plan)?;
        self.expand(q, &plan, Output::AddTo)
    }

    /// See [`lora_core::Backend::linear_lora`].
    pub(crate) fn multiply_and_add(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        lora: (&LoraSite<Self>, &CudaLoraPlan),
        out: &ViewMut<'_>,
    ) -> Result<()> {
        let (site, batch) = lora;
        check_linear(&x, site, out)?;
        check::linear(x.layout, [w.layout().rows, w.layout().cols], out.layout)?;
        if site.table.token_rows().is_some() {
            // Rows of tokens take the place of what the base layer writes, before adapters add to it.
            self.multiply(q, x, w, out)?;
            return self.add_lora(q, x, site, batch, out);
        }
        let Some(plan) = self.plan("linear_lora", q, (x.into(), x.layout, 0), site, batch, out)?
        else {
            return self.multiply(q, x, w, out);
        };
        let adapters = Adapters { args: &plan.args, batch, spec: &site.spec };
        if plan.by_tiles && self.multiply_many_rows(q, x, w, (&plan, adapters), out)? {
            return Ok(());
        }
        // The shrink comes last: a product of few rows takes its word that the inputs are there.
        let input = self.input(q, x, w)?;
        self.shrink(q, &plan)?;
        if plan.of_rows.is_some() && self.multiply_stream(q, &input, w, plan.of_rows, out)? {
            return Ok(());
        }
        // What adapters add is written, and the product of many rows reads it while it computes:
        // cheaper than to read and write the output once more.
        if plan.may_begin && plan.rows > stream::MAX_ROWS {
            self.expand(q, &plan, Output::Begin)?;
            if self.multiply_by_lt(q, &input, w, true, out)? {
                return Ok(());
            }
        }
        self.multiply_input(q, &input, w, out)?;
        self.expand(q, &plan, Output::AddTo)
    }

    /// See [`lora_core::Backend::gated_linear_lora`]; `false` where the ops must be done one after another.
    pub(crate) fn multiply_and_gate(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        lora: Option<(&LoraSite<Self>, &CudaLoraPlan)>,
        gate_up: &ViewMut<'_>,
        out: &ViewMut<'_>,
    ) -> Result<bool> {
        const OP: &str = "gated_linear_lora";
        check::silu_mul(gate_up.layout, out.layout)?;
        check::linear(x.layout, [w.layout().rows, w.layout().cols], gate_up.layout)?;
        let at_once = tiles::suits_operands(x.layout, w.layout(), out.layout);
        let without_adapters = |q: &mut CudaQueue| {
            let suited = tiles::suits_gate(x.layout, w.layout(), out.layout);
            if suited {
                self.gate_by_tiles(q, x, w, None, out)?;
            }
            Ok(suited)
        };
        let Some((site, batch)) = lora else { return without_adapters(q) };
        check_linear(&x, site, gate_up)?;
        let plan = self.plan(OP, q, (x.into(), x.layout, 0), site, batch, gate_up)?;
        let Some(plan) = plan else { return without_adapters(q) };
        if !plan.by_tiles || out.layout.dtype != DType::Bf16 || !is_aligned(out.layout) {
            return Ok(false);
        }
        let adapters = Adapters { args: &plan.args, batch, spec: &site.spec };
        self.shrink(q, &plan)?;
        if at_once {
            self.gate_by_tiles(q, x, w, Some(adapters), out)?;
        } else {
            self.multiply(q, x, w, gate_up)?;
            self.gate_added_by_tiles(q, adapters, gate_up, out)?;
        }
        Ok(true)
    }

    /// The product of many rows and what adapters add, by the kernel that does both or else by cuBLASLt on top
    /// of what it began; `false` where neither can.
    fn multiply_many_rows(
        &self,
        q: &mut CudaQueue,
        x: View<'_>,
        w: &CudaLinear,
        (plan, adapters): (&Plan, Adapters<'_>),
        out: &ViewMut<'_>,
    ) -> Result<bool> {
        self.shrink(q, plan)?;
        if tiles::suits_operands(x.layout, w.layout(), out.layout) {
            self.multiply_tiles(q, x, w, adapters, out)?;
            return Ok(true);
        }
        self.begin_by_tiles(q, adapters, out)?;
        let input = self.input(q, x, w)?;
        self.multiply_by_lt(q, &input, w, true, out)
    }

    /// What the two products will do; `None` if there is nothing to do.
    fn plan(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        (x, x_geo, ids): (MatArg, MatLayout, Address),
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
        out: &ViewMut<'_>,
    ) -> Result<Option<Plan>> {
        check_extent(op, "rows of the batch", batch.rows(), out.layout.rows)?;
        self.check_batch(op, q, site, batch, out.layout.rows)?;
        let (rows, slices) = (out.layout.rows, site.spec.slices.len());
        // What a recorded step finds when it runs is not known yet.
        let most = match q.is_recording() {
            true => site.table.slots().min(batch.most_segments()),
            false => batch.segments(),
        };
        let work = site.table.work();
        if most == 0 || rows == 0 || work == Work::Nothing {
            return Ok(None);
        }
        let max_rank = work.max_rank();
        let suited = matches!(work, Work::Mma { .. }) && suits_mma(x_geo, out.layout, max_rank);
        let by_mma = ids == 0 && suited;
        let chunk = match by_mma {
            true => chunk(site.spec.in_dim),
            false => site.spec.in_dim.max(1),
        };
        let shrinks_rows = by_mma && batch.tile_rows() == LARGE_TILE && rows >= MIN_ROWS_TO_SHRINK;
        let partials = if shrinks_rows { 0 } else { site.spec.in_dim.div_ceil(chunk) };
        let address = |view| MatArg::from(view).data();
        let for_planes = partials * rows * slices * max_rank * size_of::<f32>();
        let room = for_planes.max(shrink::bytes_of_z(rows, slices, max_rank));
        let args = LoraArgs {
            x,
            out: out.into(),
            ids,
            table: site.table.rows(),
            order: address(batch.row_order()),
            starts: address(batch.starts()),
            slots: address(batch.slots()),
            idle: address(batch.idle_rows()),
            tiles: address(batch.tiles()),
            sizes: address(batch.sizes()),
            columns: site.table.columns(),
            z: q.lora_scratch(room)?,
            inputs: q.input_words(),
            slices: slices as i32,
            max_rank: max_rank as i32,
            in_dim: site.spec.in_dim as i32,
            chunk: chunk as i32,
            partials: partials as i32,
            tile_rows: batch.tile_rows() as i32,
        };
        let few = batch.spread() == Spread::Few;
        let widest = site.spec.slices.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        // No more tiles than rows, nor than full ones and one that is not for each segment.
        let tile_rows = batch.tile_rows();
        let tiles = rows.min(rows / tile_rows + most);
        Ok(Some(Plan {
            args,
            by_mma: by_mma.then_some(tile_rows),
            rows,
            segments: most,
            tiles,
            slices,
            max_rank,
            partials,
            widest,
            of_rows: FewRows::new(&args, &site.spec).filter(|_| {
                by_mma
                    && few
                    && expand_is_hidden(rows.div_ceil(tile_rows), max_rank, out.layout.cols)
            }),
            may_begin: by_mma && matches!(work, Work::Mma { gains: false, .. }),
            by_tiles: by_mma
                && matches!(work, Work::Mma { plain: true, .. })
                && partials == 0
                && is_aligned(out.layout)
                && tiles::suits(batch, &site.spec, rows),
        }))
    }

    /// `z = A x`.
    fn shrink(&self, q: &mut CudaQueue, plan: &Plan) -> Result<()> {
        match plan.by_mma {
            Some(_) if plan.partials == 0 => {
                self.shrink_rows(q, &plan.args, plan.rows, plan.segments)
            }
            Some(tile_rows) => {
                let ranks = plan.slices * plan.max_rank.div_ceil(RANKS);
                let blocks = [plan.tiles * tile_rows / SHRINK_ROWS, ranks, plan.partials];
                let launch = Launch::new(blocks, SHRINK_THREADS);
                q.launch(&self.modules, Kernel::LoraShrinkMma, launch, plan.args)
            }
            None => {
                let launch = Launch::new([plan.rows, plan.slices, 1], ROW_THREADS);
                q.launch(&self.modules, Kernel::LoraShrink, launch, plan.args)
            }
        }
    }

    /// `y = gain * (y + scale * B z) + shift`.
    fn expand(&self, q: &mut CudaQueue, plan: &Plan, output: Output) -> Result<()> {
        if let Some(tile_rows) = plan.by_mma {
            // Where outputs are begun, rows without an adapter have tiles, too.
            let idle = match output {
                Output::AddTo => 0,
                Output::Begin => plan.rows.div_ceil(tile_rows),
            };
            let tiles = plan.tiles + idle;
            // A block goes on with other outputs of its rows where there are many blocks.
            let parts = EXPAND_BLOCKS.div_ceil(tiles * plan.slices);
            let blocks = [tiles, plan.slices, plan.widest.div_ceil(OUTPUTS).min(parts)];
            let launch = Launch::new(blocks, ROW_THREADS);
            let kernel = match (tile_rows, output) {
                (LARGE_TILE, Output::AddTo) => Kernel::LoraExpandMma32,
                (LARGE_TILE, Output::Begin) => Kernel::LoraBeginMma32,
                (_, Output::AddTo) => Kernel::LoraExpandMma8,
                (_, Output::Begin) => Kernel::LoraBeginMma8,
            };
            return q.launch(&self.modules, kernel, launch, plan.args);
        }
        // Each warp takes some outputs, so that blocks are not too many.
        let blocks = [plan.rows, plan.slices, plan.widest.div_ceil(ROW_THREADS / WARP * 8)];
        let launch = Launch::new(blocks, ROW_THREADS);
        q.launch(&self.modules, Kernel::LoraExpand, launch, plan.args)
    }

    /// Checks the slots of a batch's rows against the table of a site.
    pub(crate) fn check_slots(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
    ) -> Result<()> {
        let slots = self.ints(q, batch.slot_of_row())?.unwrap_or_default();
        let used: Vec<i32> = slots.into_iter().filter(|slot| *slot >= 0).collect();
        check::ids(op, "slot", &used, site.table.slots())
    }

    /// Checks what the batch points at.
    fn check_batch(
        &self,
        op: &'static str,
        q: &mut CudaQueue,
        site: &LoraSite<Self>,
        batch: &CudaLoraPlan,
        rows: usize,
    ) -> Result<()> {
        let [order, starts, slots] = [batch.row_order(), batch.starts(), batch.slots()];
        let outside = |limit| {
            let found = batch.segments() as i64;
            Error::OutOfRange { op, what: "segment", found, limit }
        };
        let Some(order) = self.ints(q, order)? else { return Ok(()) };
        let starts = self.ints(q, starts)?.unwrap_or_default();
        let slots = self.ints(q, slots)?.unwrap_or_default();
        check::ids(op, "slot", &slots[..batch.segments()], site.table.slots())?;
        for ends in starts[..=batch.segments()].windows(2) {
            let segment = usize::try_from(ends[0]).ok().zip(usize::try_from(ends[1]).ok());
            let listed = segment.and_then(|(from, to)| order.get(from..to));
            check::ids(op, "row", listed.ok_or_else(|| outside(order.len()))?, rows)?;
        }
        Ok(())
    }
}

/// Whether operands are as the tensor cores' kernels take them.
fn suits_mma(x: MatLayout, out: MatLayout, max_rank: usize) -> bool {
    let bf16 = x.dtype == DType::Bf16 && out.dtype == DType::Bf16;
    let ranks = (1..=MMA_MAX_RANK).contains(&max_rank);
    bf16 && ranks && x.cols.is_multiple_of(8) && is_aligned(x)
}
