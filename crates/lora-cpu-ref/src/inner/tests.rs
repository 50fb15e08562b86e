//! The two implementations against each other, and the guarantees of the fast one.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

const LEVELS: [Level; 4] = [Level::Baseline, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

/// Values in -1..1 that differ from place to place, the same on every run.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn halves(count: usize, seed: u32) -> Vec<bf16> {
    values(count, seed).into_iter().map(bf16::from_f32).collect()
}

fn weights(n: usize, k: usize, dtype: Dtype) -> Packed {
    let bytes: Vec<u8> = values(n * k, 7)
        .into_iter()
        .flat_map(|v| match dtype {
            Dtype::Bf16 => bf16::from_f32(v).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
            Dtype::F32 => v.to_le_bytes().to_vec(),
        })
        .collect();
    Packed::pack(&[Part { dtype, rows: n, bytes: &bytes }], k).unwrap()
}

fn product(isa: Isa, x: Rows<'_>, w: &Packed) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.count() * w.n()];
    matmul(isa, x, w, Out::f32(&mut y, w.n())).unwrap();
    y
}

fn obvious(x: Rows<'_>, w: &Packed) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.count() * w.n()];
    matmul_obvious(x, w, Out::f32(&mut y, w.n())).unwrap();
    y
}

fn close(a: &[f32], b: &[f32], k: usize) -> bool {
    let bound = 1e-6 * (k as f32 + 1.0);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= bound)
}

fn shape() -> impl Strategy<Value = (usize, usize, usize)> {
    let n = prop_oneof![0usize..40, 1usize..300];
    let k = prop_oneof![Just(1usize), 0usize..20, 200usize..800];
    (0usize..40, n, k)
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::Bf16), Just(Dtype::F16), Just(Dtype::F32)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_fast_product_is_the_obvious_one_up_to_rounding(
        (m, n, k) in shape(), dtype in dtype(), pad in 0usize..3,
    ) {
        let w = weights(n, k, dtype);
        let (single, half) = (values(m * (k + pad), 1), halves(m * (k + pad), 2));
        for x in [Rows::f32(&single, k + pad, m), Rows::bf16(&half, k + pad, m)] {
            let expected = obvious(x, &w);
            for level in LEVELS {
                let y = product(Isa::detect().at_most(level), x, &w);
                prop_assert!(close(&y, &expected, k), "{level:?}");
            }
        }
    }

    #[test]
    fn a_row_alone_has_the_bits_it_has_in_a_batch((m, n, k) in shape(), dtype in dtype()) {
        let w = weights(n, k, dtype);
        let (single, half) = (values(m * k, 1), halves(m * k, 2));
        for x in [Rows::f32(&single, k, m), Rows::bf16(&half, k, m)] {
            for level in LEVELS {
                let isa = Isa::detect().at_most(level);
                let batch = product(isa, x, &w);
                for row in 0..m as u32 {
                    let alone = product(isa, x.listed(&[row]), &w);
                    prop_assert_eq!(&alone[..], &batch[row as usize * n..][..n]);
                }
            }
        }
    }

    #[test]
    fn listed_rows_are_gathered_and_gaps_stay(
        (m, n, k) in shape(), picks in prop::collection::vec(0u32..40, 0..30),
    ) {
        let picks: Vec<u32> = picks.into_iter().filter(|&p| (p as usize) < m).collect();
        let (w, x, base) = (weights(n, k, Dtype::Bf16), values(m * k, 1), halves(30 * (n + 3), 3));
        let x = Rows::f32(&x, k, m).listed(&picks);
        let (mut fast, mut plain) = (base.clone(), base);
        matmul(Isa::detect(), x, &w, Out::bf16(&mut fast, n + 3)).unwrap();
        matmul_obvious(x, &w, Out::bf16(&mut plain, n + 3)).unwrap();
        for (a, b) in fast.iter().zip(&plain) {
            prop_assert!((a.to_f32() - b.to_f32()).abs() <= 0.02 * (1.0 + b.to_f32().abs()));
        }
    }
}

#[test]
fn threads_and_slabs_do_not_change_a_bit() {
    let (m, n, k) = (1030, 100, 700);
    let (w, x) = (weights(n, k, Dtype::Bf16), halves(m * k, 4));
    let x = Rows::bf16(&x, k, m);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| product(Isa::detect(), x, &w))
    };
    let one = run(1);
    assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one));
    assert_eq!(one[1029 * n..], product(Isa::detect(), x.listed(&[1029]), &w));
}

#[test]
fn a_wide_product_with_a_bias_fills_only_its_columns() {
    let (m, n, k) = (17, 1000, 600);
    let (w, x, bias) = (weights(n, k, Dtype::Bf16), halves(m * k, 4), values(n, 5));
    let x = Rows::bf16(&x, k, m);
    let mut y = vec![9.0; m * 2 * n];
    let out = Out::f32(&mut y[n..], 2 * n).bias(Some(&bias));
    matmul(Isa::detect(), x, &w, out).unwrap();
    let plain = product(Isa::detect(), x, &w);
    for (row, plain) in y.chunks(2 * n).zip(plain.chunks(n)) {
        assert!(row[..n].iter().all(|&v| v == 9.0));
        assert!(row[n..].iter().zip(plain).zip(&bias).all(|((y, p), b)| *y == p + b));
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let (w, x) = (weights(4, 3, Dtype::F32), values(6, 1));
    let run = |rows: Rows<'_>, len: usize, stride| {
        matmul(Isa::detect(), rows, &w, Out::f32(&mut vec![0.0; len], stride))
    };
    let rows = Rows::f32(&x, 3, 2);
    assert_eq!(run(rows, 8, 4), Ok(()));
    assert!(matches!(run(Rows::f32(&x, 3, 3), 12, 4), Err(InnerError::Short { what: "x", .. })));
    assert!(matches!(run(rows.listed(&[2]), 4, 4), Err(InnerError::Short { row: 2, .. })));
    assert!(matches!(run(rows, 7, 4), Err(InnerError::Short { needed: 8, found: 7, .. })));
    assert!(matches!(run(rows, 8, 3), Err(InnerError::Overlap { .. })));
    let mut y = [0.0; 8];
    let out = Out::f32(&mut y, 4).bias(Some(&[0.0; 3]));
    let wrong = matmul(Isa::detect(), rows, &w, out);
    assert!(matches!(wrong, Err(InnerError::Count { found: 3, needed: 4, .. })));
}
