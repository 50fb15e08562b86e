//! The kernels of every combination of shapes, dtypes, adapters and rows, as one table.
//!
//! A line of `table.txt` that is not indented names kernels from a number of rows on: the shrink with the rows of a
//! tile, then GEMM and expand in their order. The lines below it name the adapters, sites and uses that get them.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::segments::Segments;
use super::*;
use crate::ops::linear::choice::{Bias, Weights};

/// Multiprocessors of an H100 or H200.
const H200: usize = 132;

/// Numbers of rows of a step: around each threshold, and between them.
const ROWS: [usize; 24] = [
    1, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128, 129, 256, 257, 511, 512, 513, 1535, 1536, 2048,
    4096, 16384, 16385, 20000,
];

/// Input features and widths of the slices of a site.
struct Extents {
    name: &'static str,
    in_dim: usize,
    widths: &'static [usize],
}

const EXTENTS: [Extents; 5] = [
    Extents { name: "qkv", in_dim: 4096, widths: &[4096, 1024, 1024] },
    Extents { name: "gate_up", in_dim: 4096, widths: &[14336, 14336] },
    Extents { name: "down", in_dim: 14336, widths: &[4096] },
    Extents { name: "odd", in_dim: 1001, widths: &[96, 40] },
    Extents { name: "narrow", in_dim: 256, widths: &[96, 48] },
];

/// Dtypes of input, weights and output.
const DTYPES: [[DType; 3]; 6] = [
    [DType::Bf16; 3],
    [DType::Bf16, DType::F8E4m3, DType::Bf16],
    [DType::Bf16, DType::Bf16, DType::F32],
    [DType::F16; 3],
    [DType::F32; 3],
    [DType::F32, DType::F8E4m3, DType::F32],
];

const WORKS: [(&str, TableWork); 7] = [
    ("no adapter", TableWork::Nothing),
    ("rank 16", TableWork::Mma { rank: 16, gains: false, plain: true }),
    ("rank 64", TableWork::Mma { rank: 64, gains: false, plain: true }),
    ("rank 512", TableWork::Mma { rank: 512, gains: false, plain: true }),
    ("odd rank 16", TableWork::Mma { rank: 16, gains: false, plain: false }),
    ("rank 16 with gains", TableWork::Mma { rank: 16, gains: true, plain: false }),
    ("general, rank 16", TableWork::General { rank: 16 }),
];

/// The slot of a row.
type SlotOf = fn(usize) -> i32;

/// How the rows of a step use adapters.
const USES: [(&str, SlotOf); 3] =
    [("one", |_| 0), ("eight", |row| (row % 8) as i32), ("each", |row| row as i32)];

/// A step, a site, and what its adapters need.
#[derive(Clone, Copy)]
struct Case<'a> {
    spec: &'a SiteSpec,
    dtypes: [DType; 3],
    work: TableWork,
    slot: SlotOf,
}

impl Case<'_> {
    fn gemm(&self, rows: usize) -> GemmShape {
        let Self { spec, dtypes: [x, w, out], .. } = self;
        let w = MatLayout::dense(spec.out_dim(), spec.in_dim, *w);
        GemmShape {
            x: MatLayout::dense(rows, spec.in_dim, *x),
            w: Weights { layout: w, bias: Bias::None },
            out: MatLayout::dense(rows, spec.out_dim(), *out),
        }
    }

    fn lora(&self, rows: usize) -> LoraShape<'_> {
        let slots: Vec<i32> = (0..rows).map(self.slot).collect();
        let (gemm, step) = (self.gemm(rows), Segments::new(&slots).shape());
        LoraShape {
            x: Some(gemm.x),
            out: gemm.out,
            spec: self.spec,
            work: self.work,
            has_token_rows: false,
            step,
            segments: step.segments,
        }
    }

    /// The route of a step of `rows` rows, in a few words.
    fn route(&self, rows: usize) -> String {
        let gemm = self.gemm(rows);
        match choose(&gemm, &self.lora(rows), H200) {
            Route::Separate => "separate".to_owned(),
            Route::Base => format!("{:?}", gemm.choose()),
            Route::Adapted(low_rank, fusion) => {
                format!("{} {}", shrink_words(low_rank), fusion_words(fusion))
            }
        }
    }

    /// The same with a gate.
    fn gated(&self, rows: usize) -> String {
        let [x, ..] = self.dtypes;
        let out = MatLayout::dense(rows, self.spec.out_dim() / 2, x);
        match choose_gated(&self.gemm(rows), Some(&self.lora(rows)), out, H200) {
            GatedRoute::Separate => "separate".to_owned(),
            GatedRoute::Tiles => "Tiles".to_owned(),
            GatedRoute::TilesWithAdapters(low_rank) => {
                format!("{} Tiles fused", shrink_words(low_rank))
            }
            GatedRoute::GateAfterGemm(low_rank) => {
                format!("{} GEMM, gate by tiles", shrink_words(low_rank))
            }
        }
    }
}

/// Shrink and rows of a tile.
fn shrink_words(low_rank: LowRank) -> String {
    match low_rank {
        LowRank::General => "general".to_owned(),
        LowRank::Mma { shrink: Shrink::Cluster, tile } => format!("cluster/{}", tile.rows()),
        LowRank::Mma { shrink: Shrink::SplitK { partials, .. }, tile } => {
            format!("split{partials}/{}", tile.rows())
        }
    }
}

fn fusion_words(fusion: Fusion) -> String {
    match fusion {
        Fusion::AfterGemm(kernel) => format!("{kernel:?}, expand"),
        Fusion::Begin => "expand, Lt".to_owned(),
        Fusion::BeginByTiles => "expand by tiles, Lt".to_owned(),
        Fusion::Stream | Fusion::Tiles => format!("{fusion:?} fused"),
    }
}

/// The routes from each number of rows on.
fn sequence(route: impl Fn(usize) -> String) -> String {
    let mut routes: Vec<(usize, String)> = Vec::new();
    for rows in ROWS {
        let route = route(rows);
        if routes.last().is_none_or(|(_, last)| *last != route) {
            routes.push((rows, route));
        }
    }
    let words: Vec<_> = routes.iter().map(|(rows, route)| format!("{rows}: {route}")).collect();
    words.join(" | ")
}

/// Each sequence of routes, and below it what has it: a line for each kind of adapters, with sites and uses.
fn section(title: &str, dtypes: [DType; 3], sequence_of: impl Fn(&Case<'_>) -> String) -> String {
    let mut lines: BTreeMap<String, BTreeMap<&str, Vec<String>>> = BTreeMap::new();
    for extents in &EXTENTS {
        let spec = SiteSpec::linear(extents.in_dim, extents.widths);
        for (adapters, work) in WORKS {
            for (uses, slot) in USES {
                let sequence = sequence_of(&Case { spec: &spec, dtypes, work, slot });
                let of_adapters = lines.entry(sequence).or_default().entry(adapters).or_default();
                of_adapters.push(format!("{}/{uses}", extents.name));
            }
        }
    }
    let [x, w, out] = dtypes;
    let mut text = format!("# {title}: {x} x {w} -> {out}\n");
    for (sequence, kinds) in lines {
        writeln!(text, "{sequence}").unwrap();
        for (adapters, sites) in kinds {
            writeln!(text, "    {adapters}: {}", sites.join(" ")).unwrap();
        }
    }
    text
}

#[test]
fn every_combination_gets_the_kernels_of_the_table() {
    let mut table = String::new();
    for dtypes in DTYPES {
        let routes = |case: &Case<'_>| sequence(|rows| case.route(rows));
        table += &section("linear_lora", dtypes, routes);
    }
    for dtypes in &DTYPES[..2] {
        let routes = |case: &Case<'_>| sequence(|rows| case.gated(rows));
        table += &section("gated_linear_lora", *dtypes, routes);
    }
    assert!(table == include_str!("table.txt"), "the table is now:\n{table}");
}

#[test]
fn rows_of_tokens_and_token_ids_have_routes_of_their_own() {
    let spec = SiteSpec::linear(4096, &[4096]);
    let work = TableWork::Mma { rank: 16, gains: false, plain: true };
    let case = Case { spec: &spec, dtypes: DTYPES[0], work, slot: |_| 0 };
    let (gemm, lora) = (case.gemm(8), case.lora(8));
    let separate = LoraShape { has_token_rows: true, ..lora };
    assert_eq!(choose(&gemm, &separate, H200), Route::Separate);
    assert_eq!(LoraShape { x: None, ..lora }.low_rank(), Some(LowRank::General));
    assert_eq!(LoraShape { segments: 0, ..lora }.low_rank(), None);
}

#[test]
fn operands_that_lie_askew_go_to_kernels_for_any() {
    let spec = SiteSpec::linear(4096, &[4096]);
    let work = TableWork::Mma { rank: 16, gains: false, plain: true };
    let case = Case { spec: &spec, dtypes: DTYPES[0], work, slot: |_| 0 };
    for rows in [8, 300, 2048] {
        let (gemm, lora) = (case.gemm(rows), case.lora(rows));
        let (x, out) = (MatLayout { offset: 4, ..gemm.x }, MatLayout { offset: 4, ..gemm.out });
        let route = |gemm: GemmShape, lora: LoraShape<'_>| choose(&gemm, &lora, H200);
        assert_eq!(
            route(GemmShape { x, ..gemm }, LoraShape { x: Some(x), ..lora }),
            Route::Adapted(LowRank::General, Fusion::AfterGemm(Gemm::Any))
        );
        let Route::Adapted(low_rank, fusion) =
            route(GemmShape { out, ..gemm }, LoraShape { out, ..lora })
        else {
            panic!("{rows} rows have adapters");
        };
        assert!(low_rank != LowRank::General && fusion == Fusion::AfterGemm(Gemm::Any));
    }
}
