//! QK norms, RoPE, and the append to the KV cache.

use lora_core::fp8;
use lora_core::ops::{HeadDims, KvScales, NormWeight, QkvArgs};
use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, gaps, kv_scales, outer_rows, rows};
use super::lora_case::plan;
use super::misuse::{Misuse, refusals};
use super::num::Num;
use super::own_norms::own_site;
use super::reference::{rms_norm, rope};
use super::rig::{Gaps, Matrix, Placed, Rig};
use super::{Types, for_all};

const EPS: f32 = 1e-6;
const POSITIONS: usize = 50;

/// Shape of a call.
#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    dims: HeadDims,
    normed: bool,
    kv_scales: KvScales,
    gaps: Gaps,
    cache_gaps: Gaps,
    seed: u64,
}

/// Host operands of a call.
struct Operands {
    qkv: Matrix,
    norms: Option<[Matrix; 2]>,
    positions: Vec<i32>,
    cos_sin_table: Matrix,
    /// Rows of the caches, each at most once; -1 stores nothing.
    slots: Vec<i32>,
    cache: Matrix,
}

/// Results of a call.
struct Results {
    qkv: Matrix,
    caches: [Matrix; 2],
}

/// Dimensions of an attention layer, with groups of up to 7 heads.
pub fn dims() -> impl Strategy<Value = HeadDims> {
    dims_of(&[2, 4, 6, 16, 20, 64, 80, 128])
}

/// The same with heads of these sizes.
pub fn dims_of(sizes: &'static [usize]) -> impl Strategy<Value = HeadDims> {
    let group = prop::sample::select(vec![1usize, 2, 3, 4, 7]);
    let size = prop::sample::select(sizes);
    (group, 1usize..=3, size).prop_map(|(group, kv_heads, head_dim)| HeadDims {
        heads: group * kv_heads,
        kv_heads,
        head_dim,
    })
}

fn cases() -> impl Strategy<Value = Case> {
    (rows(), dims(), any::<bool>(), kv_scales(), gaps(), outer_rows(), any::<u64>()).prop_map(
        |(rows, dims, normed, kv_scales, gaps, cache_gaps, seed)| Case {
            rows,
            dims,
            normed,
            kv_scales,
            gaps,
            cache_gaps,
            seed,
        },
    )
}

impl Case {
    fn operands(&self, types: Types) -> Operands {
        let (mut fill, dims) = (Fill::new(self.seed), self.dims);
        let half = dims.head_dim / 2;
        let angle = |i: usize, p: usize| p as f64 * 1e4f64.powf(-(i as f64) / half as f64);
        let turn = |p: usize| {
            let cos = (0..half).map(move |i| angle(i, p).cos() as f32);
            cos.chain((0..half).map(move |i| angle(i, p).sin() as f32))
        };
        let cos_sin_table: Vec<f32> = (0..POSITIONS).flat_map(turn).collect();
        let mut slots = fill.shuffled(self.rows + 5);
        slots.truncate(self.rows);
        slots.iter_mut().filter(|slot| **slot % 5 == 4).for_each(|slot| *slot = -1);
        Operands {
            qkv: fill.matrix(self.rows, dims.q_cols() + 2 * dims.kv_cols(), types.out),
            norms: self.normed.then(|| [(); 2].map(|()| fill.matrix(1, dims.head_dim, DType::F32))),
            positions: fill.ids(self.rows, POSITIONS),
            cos_sin_table: Matrix::floats(POSITIONS, dims.head_dim, DType::F32, &cos_sin_table),
            slots,
            cache: fill.matrix(self.rows + 5, dims.kv_cols(), types.kv),
        }
    }
}

/// Norms of the adapter in slot 0 of two, and the slot of each row.
struct OwnNorms {
    weights: [Matrix; 2],
    slot_of_row: Vec<i32>,
}

/// Runs the op without adapters.
fn appended<B: Backend>(
    rig: &mut Rig<B>,
    case: &Case,
    operands: &Operands,
) -> Result<Results, TestCaseError> {
    appended_with(rig, case, operands, None)
}

/// Runs the op.
fn appended_with<B: Backend>(
    rig: &mut Rig<B>,
    case: &Case,
    operands: &Operands,
    own: Option<&OwnNorms>,
) -> Result<Results, TestCaseError> {
    let mut qkv = rig.place(&operands.qkv, case.gaps)?;
    let mut k_cache = rig.place(&operands.cache, case.cache_gaps)?;
    let mut v_cache = rig.place(&operands.cache, case.cache_gaps)?;
    let norms = match &operands.norms {
        Some([q, k]) => Some([rig.place(q, Gaps::default())?, rig.place(k, Gaps::default())?]),
        None => None,
    };
    let sites = match own {
        Some(own) => {
            let [q, k] = &own.weights;
            Some(([own_site(rig, q)?, own_site(rig, k)?], plan(rig, &own.slot_of_row)?))
        }
        None => None,
    };
    let norm = |i: usize| {
        let base = norms.as_ref().map(|norms| norms[i].view())?;
        Some(NormWeight { base, lora: sites.as_ref().map(|(sites, batch)| (&sites[i], batch)) })
    };
    let (positions, slots) = (rig.ids(&operands.positions)?, rig.ids(&operands.slots)?);
    let cos_sin_table = rig.place(&operands.cos_sin_table, Gaps::default())?;
    let args = QkvArgs {
        qkv: qkv.view_mut(),
        dims: case.dims,
        norms: norm(0).zip(norm(1)).map(|(q, k)| (q, k, EPS)),
        positions: positions.view(),
        cos_sin_table: cos_sin_table.view(),
        kv_slots: slots.view(),
        k_cache: k_cache.view_mut(),
        v_cache: v_cache.view_mut(),
        kv_scales: case.kv_scales,
    };
    rig.be.qk_norm_rope_append(&mut rig.q, args)?;
    Ok(Results { qkv: qkv.read(rig)?, caches: [k_cache.read(rig)?, v_cache.read(rig)?] })
}

/// Queries and keys of a row, normalised and rotated.
fn rotated(operands: &Operands, dims: HeadDims, row: usize) -> Vec<Num> {
    let cos_sin = operands.cos_sin_table.nums(operands.positions[row] as usize);
    let heads = dims.heads + dims.kv_heads;
    let values = operands.qkv.nums(row);
    let head = |(h, head): (usize, &[Num])| match &operands.norms {
        Some(norms) => {
            let w = norms[usize::from(h >= dims.heads)].nums(0);
            rope(&rms_norm(head, &w, EPS), &cos_sin)
        }
        None => rope(head, &cos_sin),
    };
    values.chunks_exact(dims.head_dim).take(heads).enumerate().flat_map(head).collect()
}

/// A key as it is stored, before rounding.
fn stored(key: Num, case: &Case, types: Types) -> Num {
    let key = key * (1.0 / f64::from(case.kv_scales.k));
    let most = if types.kv == DType::F8E4m3 { f64::from(fp8::MAX) } else { f64::INFINITY };
    // On the way, f16 subnormals are rounded to their spacing.
    let spacing = f64::from(f32::from(half::f16::MIN_POSITIVE) / case.kv_scales.k);
    Num { value: key.value.clamp(-most, most), size: key.size + spacing }
}

/// Some columns of a matrix.
fn columns(matrix: &Matrix, cols: std::ops::Range<usize>) -> Matrix {
    let values = (0..matrix.rows).flat_map(|r| cols.clone().map(move |c| matrix.at(r, c)));
    let values: Vec<f32> = values.collect();
    Matrix::floats(matrix.rows, cols.len(), matrix.dtype(), &values)
}

/// Each head of q and k is normalised, if there are norms, and rotated by its position. q is stored in
/// place, k and v in the row's KV slot. Slot -1 stores nothing, and other cache rows keep their bits.
pub fn heads_are_normalised_rotated_and_stored<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    for_all(make, 128, cases(), |rig, case| {
        let (operands, dims) = (case.operands(types), case.dims);
        let found = appended(rig, case, &operands)?;
        let (q, kv) = (dims.q_cols(), dims.kv_cols());
        let class = Class::Dot(dims.head_dim);
        let rows: Vec<_> = (0..case.rows).map(|r| rotated(&operands, dims, r)).collect();
        let queries: Vec<Num> = rows.iter().flat_map(|row| row[..q].to_vec()).collect();
        close("queries", &columns(&found.qkv, 0..q), &queries, class)?;

        let values = columns(&operands.qkv, q + kv..q + 2 * kv);
        exact("v part of qkv", &columns(&found.qkv, q + kv..q + 2 * kv), &values)?;
        let scaled: Vec<f32> = values.data.iter_f32().map(|v| v / case.kv_scales.v).collect();
        let values = Matrix::floats(values.rows, values.cols, types.kv, &scaled);
        for place in 0..operands.cache.rows {
            let old = operands.cache.pick(&[place]);
            let [k, v] = found.caches.each_ref().map(|cache| cache.pick(&[place]));
            match operands.slots.iter().position(|slot| *slot == place as i32) {
                Some(row) => {
                    // Keys may be stored in `qkv` temporarily.
                    let class = Class::Through(dims.head_dim, types.out);
                    let keys: Vec<_> =
                        rows[row][q..].iter().map(|n| stored(*n, case, types)).collect();
                    close("stored keys", &k, &keys, class)?;
                    exact("stored values", &v, &values.pick(&[row]))?;
                }
                None => {
                    exact("other keys", &k, &old)?;
                    exact("other values", &v, &old)?;
                }
            }
        }
        for row in 0..case.rows {
            let alone = Case { rows: 1, gaps: Gaps::default(), ..case.clone() };
            let one = Operands {
                qkv: operands.qkv.pick(&[row]),
                positions: vec![operands.positions[row]],
                slots: vec![operands.slots[row]],
                norms: operands.norms.clone(),
                cos_sin_table: operands.cos_sin_table.clone(),
                cache: operands.cache.clone(),
            };
            let single = appended(rig, &alone, &one)?;
            exact("qkv of one row", &single.qkv, &found.qkv.pick(&[row]))?;
        }
        Ok(())
    });
}

/// A row whose adapter has its own QK norms gets the same bits as if those were the base model's; other
/// rows are not affected.
pub fn heads_are_normalised_by_the_norms_of_their_row<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    for_all(make, 64, cases(), |rig, case| {
        let case = Case { normed: true, ..case.clone() };
        let operands = case.operands(types);
        let mut fill = Fill::new(case.seed ^ 3);
        let weights = [(); 2].map(|()| fill.matrix(1, case.dims.head_dim, DType::F32));
        let slot_of_row: Vec<i32> = fill.ids(case.rows, 3).iter().map(|slot| slot - 1).collect();
        let base = appended(rig, &case, &operands)?;
        let norms = Some(weights.clone());
        let all_own = appended(rig, &case, &Operands { norms, ..case.operands(types) })?;
        let own = OwnNorms { weights, slot_of_row };
        let found = appended_with(rig, &case, &operands, Some(&own))?;
        for (row, slot) in own.slot_of_row.iter().enumerate() {
            let expected = if *slot == 0 { &all_own } else { &base };
            exact("qkv", &found.qkv.pick(&[row]), &expected.qkv.pick(&[row]))?;
            if let Ok(place) = usize::try_from(operands.slots[row]) {
                let keys = [&found, expected].map(|results| results.caches[0].pick(&[place]));
                exact("stored keys", &keys[0], &keys[1])?;
            }
        }
        Ok(())
    });
}

/// Valid operands in the backend's memory.
struct Right<B: Backend> {
    norm: Placed<B>,
    positions: Placed<B>,
    cos_sin_table: Placed<B>,
    slots: Placed<B>,
    outs: [Placed<B>; 3],
}

const DIMS: HeadDims = HeadDims { heads: 4, kv_heads: 2, head_dim: 4 };

impl<B: Backend> Right<B> {
    fn new(rig: &mut Rig<B>, types: Types) -> lora_core::Result<Self> {
        let none = Gaps::default();
        let case = Case {
            rows: 3,
            dims: DIMS,
            normed: true,
            kv_scales: KvScales::ONE,
            gaps: none,
            cache_gaps: none,
            seed: 5,
        };
        let operands = case.operands(types);
        Ok(Self {
            norm: rig.place(&Fill::new(6).matrix(1, DIMS.head_dim, DType::F32), none)?,
            positions: rig.ids(&[0, 1, POSITIONS as i32 - 1])?,
            cos_sin_table: rig.place(&operands.cos_sin_table, none)?,
            slots: rig.ids(&[0, -1, 7])?,
            outs: [
                rig.place(&operands.qkv, none)?,
                rig.place(&operands.cache, none)?,
                rig.place(&operands.cache, none)?,
            ],
        })
    }
}

/// Checks that the call is refused after the change `spoil`.
fn refused<B: Backend>(
    m: &mut Misuse<B>,
    right: &mut Right<B>,
    what: &str,
    spoil: fn(&mut QkvArgs<'_, B>),
) {
    let Right { norm, positions, cos_sin_table, slots, outs } = right;
    m.refused(&format!("qk_norm_rope_append: {what}"), outs, |rig, [qkv, k, v]| {
        let mut args = QkvArgs {
            qkv: qkv.view_mut(),
            dims: DIMS,
            norms: Some((norm.view().into(), norm.view().into(), EPS)),
            positions: positions.view(),
            cos_sin_table: cos_sin_table.view(),
            kv_slots: slots.view(),
            k_cache: k.view_mut(),
            v_cache: v.view_mut(),
            kv_scales: KvScales::ONE,
        };
        spoil(&mut args);
        rig.be.qk_norm_rope_append(&mut rig.q, args)
    });
}

/// A misuse of the op: a description, and the change that makes operands invalid.
type Spoil<B> = (&'static str, fn(&mut QkvArgs<'_, B>));

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn rotation_refuses_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let spoils: [Spoil<B>; 16] = [
        ("columns of qkv", |a| a.qkv.layout = a.qkv.layout.slice_cols(0..31)),
        ("integers for qkv", |a| a.qkv.layout.dtype = DType::I32),
        ("an odd head_dim", |a| {
            a.dims = HeadDims { heads: 8, kv_heads: 4, head_dim: 1 };
            a.k_cache.layout = a.k_cache.layout.slice_cols(0..4);
            a.v_cache.layout = a.v_cache.layout.slice_cols(0..4);
            a.qkv.layout = a.qkv.layout.slice_cols(0..16);
            a.cos_sin_table.layout = a.cos_sin_table.layout.slice_cols(0..1);
            a.norms = None;
        }),
        ("rows of positions", |a| a.positions.layout = a.positions.layout.slice_cols(0..2)),
        ("dtype of positions", |a| a.positions.layout.dtype = DType::F32),
        ("rows of kv_slots", |a| a.kv_slots.layout = a.kv_slots.layout.slice_cols(0..2)),
        ("dtype of kv_slots", |a| a.kv_slots.layout.dtype = DType::F32),
        ("columns of cos_sin_table", |a| {
            a.cos_sin_table.layout = a.cos_sin_table.layout.slice_cols(0..2)
        }),
        ("16-bit cos_sin_table", |a| a.cos_sin_table.layout.dtype = DType::Bf16),
        ("integer cos_sin_table", |a| a.cos_sin_table.layout.dtype = DType::I32),
        ("columns of k_cache", |a| a.k_cache.layout = a.k_cache.layout.slice_cols(0..7)),
        ("columns of v_cache", |a| a.v_cache.layout = a.v_cache.layout.slice_cols(0..7)),
        ("rows of v_cache", |a| a.v_cache.layout = a.v_cache.layout.slice_rows(0..7)),
        ("integers for k_cache", |a| a.k_cache.layout.dtype = DType::I32),
        ("columns of a norm", |a| {
            if let Some((_, k, _)) = &mut a.norms {
                k.base = k.base.slice_cols(0..3);
            }
        }),
        ("dtype of a norm", |a| {
            if let Some((q, _, _)) = &mut a.norms {
                q.base.layout.dtype = DType::F16;
            }
        }),
    ];
    refusals(make, |m| {
        let mut right = Right::new(&mut m.rig, types)?;
        for (what, spoil) in spoils {
            refused(m, &mut right, what, spoil);
        }
        Ok(())
    });
}

/// Positions and slots out of range are errors, and nothing is written.
pub fn rotation_refuses_ids_out_of_range<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        for bad in [POSITIONS as i32, -1, i32::MAX] {
            let mut right = Right::new(&mut m.rig, types)?;
            right.positions = m.rig.ids(&[0, 1, bad])?;
            refused(m, &mut right, &format!("position {bad} of {POSITIONS}"), |_| {});
        }
        for bad in [8, -2, i32::MAX, i32::MIN] {
            let mut right = Right::new(&mut m.rig, types)?;
            right.slots = m.rig.ids(&[0, 1, bad])?;
            refused(m, &mut right, &format!("KV slot {bad} of 8"), |_| {});
        }
        Ok(())
    });
}
