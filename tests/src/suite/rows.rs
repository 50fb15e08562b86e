//! Embedding lookups, gathers, copies, the activation, and transfers.

use lora_core::{Backend, DType};
use proptest::prelude::*;

use super::compare::{Class, close, exact};
use super::draw::{Fill, cols, gaps, rows};
use super::misuse::refusals;
use super::num::Num;
use super::reference::silu_mul;
use super::rig::{Gaps, Matrix};
use super::{Types, for_all};

const NONE: Gaps = Gaps { outer_rows: 0, left: 0, right: 0 };

/// `out[i] = table[ids[i]]`, rounded to the dtype of `out`, for a table of one or two parts.
pub fn embedding_looks_rows_up<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (rows(), 1usize..70, 0usize..5, cols(), gaps(), any::<u64>());
    for_all(make, 128, case, |rig, &(rows, vocab, extra, cols, gaps, seed)| {
        let mut fill = Fill::new(seed);
        let parts = [fill.matrix(vocab, cols, types.w), fill.matrix(extra, cols, types.w)];
        let table = rig.be.prepare_linear(&parts.clone().map(|part| part.data), None)?;
        let ids = fill.ids(rows, vocab + extra);
        let mut out = rig.place(&fill.matrix(rows, cols, types.out), gaps)?;
        let placed = rig.ids(&ids)?;
        rig.be.embed(&mut rig.q, &table, placed.view(), out.view_mut())?;

        let row = |id: &i32| {
            let id = *id as usize;
            if id < vocab { parts[0].nums(id) } else { parts[1].nums(id - vocab) }
        };
        let values: Vec<f32> = ids.iter().flat_map(row).map(|v| v.value as f32).collect();
        let expected = Matrix::floats(rows, cols, types.out, &values);
        exact("embed", &out.read(rig)?, &expected)
    });
}

/// `out[i] = x[rows[i]]`, rounded to the dtype of `out`; rows may repeat.
pub fn gathering_copies_rows<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (rows(), 1usize..40, cols(), gaps(), gaps(), any::<u64>());
    for_all(make, 128, case, |rig, &(rows, from, cols, x_gaps, out_gaps, seed)| {
        let mut fill = Fill::new(seed);
        let x = fill.matrix(from, cols, types.x);
        let list = fill.ids(rows, from);
        let mut out = rig.place(&fill.matrix(rows, cols, types.out), out_gaps)?;
        let (placed, ids) = (rig.place(&x, x_gaps)?, rig.ids(&list)?);
        rig.be.gather_rows(&mut rig.q, placed.view(), ids.view(), out.view_mut())?;
        let list: Vec<usize> = list.iter().map(|r| *r as usize).collect();
        exact("gather_rows", &out.read(rig)?, &x.pick(&list).cast(types.out))
    });
}

/// Integers keep their bits, even those that would be NaN as floats.
pub fn gathering_moves_integers_as_they_are<B: Backend>(make: &dyn Fn() -> B, _: Types) {
    let case = (rows(), 1usize..40, 1usize..9, gaps(), gaps(), any::<u64>());
    for_all(make, 128, case, |rig, &(rows, from, cols, x_gaps, out_gaps, seed)| {
        let x = ints(from, cols, seed);
        let list = Fill::new(seed).ids(rows, from);
        let mut out = rig.place(&ints(rows, cols, !seed), out_gaps)?;
        let (placed, ids) = (rig.place(&x, x_gaps)?, rig.ids(&list)?);
        rig.be.gather_rows(&mut rig.q, placed.view(), ids.view(), out.view_mut())?;
        let list: Vec<usize> = list.iter().map(|r| *r as usize).collect();
        exact("gather_rows", &out.read(rig)?, &x.pick(&list))
    });
}

/// Rows of a matrix are copied to other rows; all others keep their values.
pub fn rows_are_copied_within_a_matrix<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (0usize..6, 0usize..4, 0usize..4, any::<bool>(), cols(), gaps(), any::<u64>());
    for_all(make, 128, case, |rig, &(count, before, between, down, cols, gaps, seed)| {
        let rows = before + 2 * count + between + 1;
        let x = Fill::new(seed).matrix(rows, cols, types.w);
        let mut placed = rig.place(&x, gaps)?;
        let (first, second) = (before, before + count + between);
        let (from, to) = if down { (first, second) } else { (second, first) };
        rig.be.copy_rows(&mut rig.q, placed.view_mut(), from..from + count, to)?;
        let mut source: Vec<usize> = (0..rows).collect();
        for i in 0..count {
            source[to + i] = from + i;
        }
        exact("copy_rows", &placed.read(rig)?, &x.pick(&source))
    });
}

/// Rows out of range and overlapping rows are errors.
pub fn copies_outside_or_onto_themselves_are_refused<B: Backend>(
    make: &dyn Fn() -> B,
    types: Types,
) {
    refusals(make, |misuse| {
        let x = Fill::new(1).matrix(6, 3, types.w);
        let mut outs = [misuse.rig.place(&x, NONE)?];
        for (what, from, to) in [
            ("copy_rows: source rows", 5..7, 0),
            ("copy_rows: target rows", 0..2, 5),
            ("copy_rows: overlap", 1..3, 2),
        ] {
            misuse.refused(what, &mut outs, |rig, [x]| {
                rig.be.copy_rows(&mut rig.q, x.view_mut(), from, to)
            });
        }
        Ok(())
    });
}

/// `out = silu(gate) * up`, without overflow for large gates.
pub fn the_gate_is_silu_times_up<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let scale = prop::sample::select(vec![1f32, 10.0, 60.0]);
    let case = (rows(), cols(), scale, gaps(), gaps(), any::<u64>());
    for_all(make, 128, case, |rig, &(rows, cols, scale, x_gaps, out_gaps, seed)| {
        let mut fill = Fill::new(seed);
        let row = |_| {
            let gate: Vec<f32> = fill.values(cols).iter().map(|v| v * scale).collect();
            [gate, fill.values(cols)].concat()
        };
        let values: Vec<f32> = (0..rows).flat_map(row).collect();
        let gate_up = Matrix::floats(rows, 2 * cols, types.out, &values);
        let mut out = rig.place(&fill.matrix(rows, cols, types.x), out_gaps)?;
        let placed = rig.place(&gate_up, x_gaps)?;
        rig.be.silu_mul(&mut rig.q, placed.view(), out.view_mut())?;
        let expected: Vec<Num> = (0..rows * cols)
            .map(|i| (i / cols, i % cols))
            .map(|(r, c)| silu_mul(gate_up.at(r, c).into(), gate_up.at(r, cols + c).into()))
            .collect();
        close("silu_mul", &out.read(rig)?, &expected, Class::Rounded)
    });
}

/// An uploaded matrix can be downloaded, completely and in slices of columns.
pub fn what_is_uploaded_comes_back<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    let case = (0usize..20, 0usize..40, (0usize..40, 0usize..40), gaps(), any::<u64>());
    for_all(make, 128, case, |rig, &(rows, cols, (a, b), gaps, seed)| {
        for matrix in [Fill::new(seed).matrix(rows, cols, types.w), ints(rows, cols, seed)] {
            let placed = rig.place(&matrix, gaps)?;
            exact("upload and download", &placed.read(rig)?, &matrix)?;
            let inside = rig.download(placed.view())?;
            prop_assert_eq!(&inside[..], &matrix.data.bytes()[..], "download of a slice");
            let (from, to) = (a.min(b).min(cols), a.max(b).min(cols));
            let part = rig.download(placed.view().slice_cols(from..to))?;
            let size = matrix.dtype().size();
            let rows = (0..rows).flat_map(|r| &matrix.row_bytes(r)[from * size..to * size]);
            prop_assert!(part.iter().eq(rows), "download of columns {from}..{to}");
        }
        Ok(())
    });
}

fn ints(rows: usize, cols: usize, seed: u64) -> Matrix {
    let values = Fill::new(seed).ids(rows * cols, 1 << 31);
    Matrix::ints(rows, cols, &values)
}

/// Wrong shapes and dtypes are errors, and nothing is written.
pub fn row_ops_refuse_misfits<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let mut fill = Fill::new(1);
        let x = m.rig.place(&fill.matrix(4, 6, types.x), NONE)?;
        let gate_up = m.rig.place(&fill.matrix(4, 12, types.out), NONE)?;
        let table = m.rig.be.prepare_linear(&[fill.matrix(9, 6, types.w).data], None)?;
        let (two, four) = (m.rig.ids(&[0, 1])?, m.rig.ids(&[0, 1, 2, 3])?);
        let column = m.rig.place(&Matrix::ints(4, 1, &[0, 1, 2, 3]), NONE)?;
        let mut out = [m.rig.place(&fill.matrix(4, 6, types.out), NONE)?];
        let mut narrow = [m.rig.place(&fill.matrix(4, 5, types.out), NONE)?];

        for (what, ids) in [
            ("too few ids", two.view()),
            ("a column of ids", column.view()),
            ("ids of dtype float32", four.mistyped(DType::F32)),
        ] {
            m.refused(&format!("embed: {what}"), &mut out, |rig, [out]| {
                rig.be.embed(&mut rig.q, &table, ids, out.view_mut())
            });
            m.refused(&format!("gather_rows: {what}"), &mut out, |rig, [out]| {
                rig.be.gather_rows(&mut rig.q, x.view(), ids, out.view_mut())
            });
        }
        m.refused("embed: columns of out", &mut narrow, |rig, [out]| {
            rig.be.embed(&mut rig.q, &table, four.view(), out.view_mut())
        });
        m.refused("gather_rows: columns of out", &mut narrow, |rig, [out]| {
            rig.be.gather_rows(&mut rig.q, x.view(), four.view(), out.view_mut())
        });
        m.refused("gather_rows: integers", &mut out, |rig, [out]| {
            let out = out.mistyped_mut(DType::I32);
            rig.be.gather_rows(&mut rig.q, x.view(), four.view(), out)
        });
        for (what, input) in [
            ("columns of gate_up", gate_up.view().slice_cols(0..11)),
            ("rows of gate_up", gate_up.view().slice_rows(0..3)),
            ("integers", gate_up.mistyped(DType::I32)),
        ] {
            m.refused(&format!("silu_mul: {what}"), &mut out, |rig, [out]| {
                rig.be.silu_mul(&mut rig.q, input, out.view_mut())
            });
        }
        let bytes = vec![0; 4 * 5 * types.out.size()];
        m.refused("upload: too few bytes", &mut out, |rig, [out]| {
            rig.be.upload(&mut rig.q, &bytes, out.view_mut())
        });
        m.refused("upload: gaps between rows", &mut out, |rig, [out]| {
            let mut part = out.view_mut();
            part.layout = part.layout.slice_cols(0..5);
            rig.be.upload(&mut rig.q, &bytes, part)
        });
        Ok(())
    });
}

/// Ids out of range are errors, and nothing is written.
pub fn row_ops_refuse_ids_out_of_range<B: Backend>(make: &dyn Fn() -> B, types: Types) {
    refusals(make, |m| {
        let mut fill = Fill::new(2);
        let x = m.rig.place(&fill.matrix(4, 6, types.x), NONE)?;
        let table = m.rig.be.prepare_linear(&[fill.matrix(4, 6, types.w).data], None)?;
        let mut out = [m.rig.place(&fill.matrix(3, 6, types.out), NONE)?];
        for bad in [4, -1, i32::MAX, i32::MIN] {
            let ids = m.rig.ids(&[0, 3, bad])?;
            m.refused(&format!("embed: id {bad} of 4"), &mut out, |rig, [out]| {
                rig.be.embed(&mut rig.q, &table, ids.view(), out.view_mut())
            });
            m.refused(&format!("gather_rows: row {bad} of 4"), &mut out, |rig, [out]| {
                rig.be.gather_rows(&mut rig.q, x.view(), ids.view(), out.view_mut())
            });
        }
        Ok(())
    });
}
