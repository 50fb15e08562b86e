//! Order of the rows of NeMo's fused modules.

use super::super::fuse::{Member, Pair};
use super::super::stack::{Rows, Stack};
use super::super::{WriteError, inexpressible};
use crate::adapter::{LowRank, RowOrder};
use crate::config::NemoQkvLayout;
use crate::geometry::ModelGeometry;
use crate::modules::SiteKey;

/// The model and row order of the archive, which determine the places of rows.
pub(super) struct Shape<'a> {
    pub model: Option<&'a ModelGeometry>,
    pub rows: NemoQkvLayout,
}

/// A run of rows of one part, which stays contiguous in both row orders of a fused module.
struct Block {
    part: usize,
    len: usize,
    /// Its first row in the part.
    in_part: usize,
    /// Its first row in a fused module that is ordered by part.
    by_part: usize,
    /// Its first row in a fused module that is ordered by KV head.
    by_head: usize,
}

/// The blocks of parts of these widths, each divided among `groups` KV heads.
fn blocks(widths: &[usize], groups: usize) -> Vec<Block> {
    let total: usize = widths.iter().sum();
    let mut blocks = Vec::with_capacity(groups * widths.len());
    for group in 0..groups {
        for (part, width) in widths.iter().enumerate() {
            let before: usize = widths[..part].iter().sum();
            let (len, in_part) = (width / groups, group * width / groups);
            let (by_part, by_head) = (before + in_part, (group * total + before) / groups);
            blocks.push(Block { part, len, in_part, by_part, by_head });
        }
    }
    blocks
}

impl<'a> Shape<'a> {
    /// The present parts of a fused module with the places of their rows, and the number of rows of the fused
    /// module.
    pub fn members(
        &self,
        qkv: bool,
        keys: &[SiteKey],
        lows: &[Option<&'a LowRank>],
    ) -> Result<(Vec<Member<'a>>, usize), WriteError> {
        let mut widths = Vec::with_capacity(keys.len());
        for (nth, (key, low)) in keys.iter().zip(lows).enumerate() {
            let known = self.model.map(|model| match (qkv, nth) {
                (true, 0) => model.heads * model.head_dim,
                (true, _) => model.kv_heads * model.head_dim,
                (false, _) => model.intermediate,
            });
            widths.push(width(*key, *low, known)?);
        }
        let interleaved = qkv && self.rows == NemoQkvLayout::Interleaved;
        let groups = if interleaved { self.groups(keys, &widths)? } else { 1 };
        let blocks = blocks(&widths, groups);
        let members = keys.iter().zip(lows).enumerate().filter_map(|(part, (key, low))| {
            let own = blocks.iter().filter(|block| block.part == part);
            let rows = own.map(|block| Rows {
                taken: block.in_part..block.in_part + block.len,
                first: if interleaved { block.by_head } else { block.by_part },
                step: 1,
            });
            Some(Member { key: *key, low: (*low)?, rows: rows.collect() })
        });
        Ok((members.collect(), widths.iter().sum()))
    }

    /// A fused query, key and value update, its rows reordered for the archive.
    pub fn reordered(&self, key: SiteKey, low: &LowRank) -> Result<Pair, WriteError> {
        let from = low.rows;
        let to = match self.rows {
            NemoQkvLayout::Interleaved => RowOrder::ByKvHead,
            NemoQkvLayout::Concatenated => RowOrder::ByPart,
        };
        let pair = Pair::of(low);
        if from == to {
            return Ok(pair);
        }
        let model = self.model.ok_or_else(|| unknown_model(key))?;
        let [q, kv] = [model.heads, model.kv_heads].map(|heads| heads * model.head_dim);
        let widths = [q, kv, kv];
        let [_, output, rank] = pair.b.extents();
        width(key, Some(low), Some(widths.iter().sum()))?;
        let mut b = Stack::zeros(low.b.dtype(), [1, output, rank]);
        for block in blocks(&widths, self.groups(&[key], &widths)?) {
            let (from, first) = match to {
                RowOrder::ByKvHead => (block.by_part, block.by_head),
                RowOrder::ByPart => (block.by_head, block.by_part),
            };
            b.place(&low.b, Rows { taken: from..from + block.len, first, step: 1 }, 0);
        }
        Ok(Pair { b, ..pair })
    }

    /// The number of KV heads, which must divide all widths.
    fn groups(&self, keys: &[SiteKey], widths: &[usize]) -> Result<usize, WriteError> {
        let key = keys.first().copied().unwrap_or(SiteKey::Head);
        let groups = self.model.ok_or_else(|| unknown_model(key))?.kv_heads;
        if groups == 0 || widths.iter().any(|width| !width.is_multiple_of(groups)) {
            return Err(inexpressible(
                &key,
                format!("query, key and value of {widths:?} rows"),
                format!("rows of {groups} KV heads"),
                "name the model that the adapter was trained for",
            ));
        }
        Ok(groups)
    }
}

/// The number of rows of a part: that of its update, which must agree with the model if it is known.
fn width(key: SiteKey, low: Option<&LowRank>, known: Option<usize>) -> Result<usize, WriteError> {
    let own = low.and_then(|low| low.b.shape().first().copied());
    match (own, known) {
        (Some(own), Some(known)) if own != known => Err(inexpressible(
            &key,
            format!("{own} rows of B"),
            format!("{known} rows on this model"),
            "name the model that the adapter was trained for",
        )),
        (own, known) => own.or(known).ok_or_else(|| unknown_model(key)),
    }
}

fn unknown_model(key: SiteKey) -> WriteError {
    inexpressible(
        &key,
        "rows whose number or order only the model can tell",
        "an adapter together with its model",
        "name the model (--model)",
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::super::fuse::fuse;
    use super::*;
    use crate::device::{DType, HostTensor};
    use crate::ids::LayerIdx;
    use crate::modules::TargetModule;

    const PARTS: [TargetModule; 3] =
        [TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV];

    fn model(heads: usize, kv_heads: usize, head_dim: usize) -> ModelGeometry {
        ModelGeometry {
            hidden: 3,
            intermediate: 5,
            layers: 1,
            heads,
            kv_heads,
            head_dim,
            vocab: 9,
            num_experts: 0,
            moe_intermediate: 0,
            qk_norms: false,
            tied_embeddings: false,
            hf_modules: Vec::new(),
            biased_modules: BTreeSet::new(),
        }
    }

    fn low(rank: usize, output: usize, first: f32) -> LowRank {
        let tensor = |shape: [usize; 2], first: f32| {
            let values: Vec<f32> =
                (0..shape[0] * shape[1]).map(|i| first + i as f32 / 8.0).collect();
            HostTensor::from_f32(DType::F32, shape.to_vec(), &values).unwrap()
        };
        let (a, b) = (tensor([rank, 3], first), tensor([output, rank], -first));
        let rows = RowOrder::ByPart;
        LowRank { rank, scale: 1.0, a, b, magnitude: None, b_bias: None, rows }
    }

    /// Rows of B A.
    fn product(rank: usize, a: &[f32], b: &[f32]) -> Vec<Vec<f32>> {
        let element =
            |row: &[f32], column: usize| (0..rank).map(|k| row[k] * a[k * 3 + column]).sum();
        b.chunks(rank).map(|row| (0..3).map(|column| element(row, column)).collect()).collect()
    }

    fn of_pair(pair: Pair) -> Vec<Vec<f32>> {
        let values = |stack: Stack| {
            let extents = stack.extents();
            let bytes = stack.dense(extents).bytes().into_owned();
            HostTensor::new(DType::F32, extents.to_vec(), bytes).unwrap().to_f32()
        };
        product(pair.rank, &values(pair.a), &values(pair.b))
    }

    /// Part and row of the part, for a row of the fused module.
    fn origin(row: usize, model: &ModelGeometry, order: NemoQkvLayout) -> (usize, usize) {
        let (group_heads, dim) = (model.heads / model.kv_heads, model.head_dim);
        let (head, within) = (row / dim, row % dim);
        let kv = model.kv_heads;
        let (part, head) = match order {
            NemoQkvLayout::Concatenated if head < model.heads => (0, head),
            NemoQkvLayout::Concatenated => {
                (1 + (head - model.heads) / kv, (head - model.heads) % kv)
            }
            NemoQkvLayout::Interleaved => {
                let (group, place) = (head / (group_heads + 2), head % (group_heads + 2));
                match place.checked_sub(group_heads) {
                    None => (0, group * group_heads + place),
                    Some(part) => (1 + part, group),
                }
            }
        };
        (part, head * dim + within)
    }

    proptest! {
        #[test]
        fn every_row_of_the_fused_module_is_the_row_of_its_part(
            (kv_heads, group, head_dim) in (1..4usize, 1..4usize, 1..4usize),
            ranks in proptest::array::uniform3(0..4usize),
            tied: bool,
            interleaved: bool,
        ) {
            let model = model(kv_heads * group, kv_heads, head_dim);
            let order =
                if interleaved { NemoQkvLayout::Interleaved } else { NemoQkvLayout::Concatenated };
            let widths = [model.heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
            let lows: Vec<Option<LowRank>> = (0..3)
                .map(|part| {
                    let rank = if tied { ranks[0].max(1) } else { ranks[part] };
                    let mut low = low(rank.max(1), widths[part], 1.0 + part as f32);
                    if tied {
                        low.a = self::low(rank, 1, 1.0).a;
                    }
                    (ranks[part] > 0).then_some(low)
                })
                .collect();
            let keys = PARTS.map(|part| SiteKey::Layer(LayerIdx(0), part));
            let shape = Shape { model: Some(&model), rows: order };
            let references: Vec<Option<&LowRank>> = lows.iter().map(Option::as_ref).collect();
            let (members, output) = shape.members(true, &keys, &references).unwrap();
            let Some(pair) = fuse(&members, 1, output).unwrap() else { return Ok(()) };
            let products: Vec<Option<Vec<Vec<f32>>>> = lows
                .iter()
                .map(|low| {
                    let low = low.as_ref()?;
                    Some(product(low.rank, &low.a.to_f32(), &low.b.to_f32()))
                })
                .collect();
            let rank = pair.rank;
            let fused = of_pair(pair);
            prop_assert_eq!(fused.len(), widths.iter().sum::<usize>());
            for (row, values) in fused.iter().enumerate() {
                let (part, own) = origin(row, &model, order);
                let expected = products[part].as_ref().map_or(vec![0.0; 3], |p| p[own].clone());
                prop_assert_eq!(values, &expected, "row {} is row {} of part {}", row, own, part);
            }
            let present = lows.iter().flatten();
            let stacked = present.clone().map(|low| low.rank).sum::<usize>();
            prop_assert_eq!(rank, if tied { present.map(|low| low.rank).max().unwrap() } else { stacked });
        }

        #[test]
        fn a_fused_module_changes_between_the_orders_and_back(
            (kv_heads, group, head_dim) in (1..4usize, 1..4usize, 1..4usize),
        ) {
            let model = model(kv_heads * group, kv_heads, head_dim);
            let key = SiteKey::Layer(LayerIdx(0), TargetModule::AttnQkv);
            let mut low = low(2, (group + 2) * kv_heads * head_dim, 1.0);
            let by_part = product(2, &low.a.to_f32(), &low.b.to_f32());
            let shape = |rows| Shape { model: Some(&model), rows };
            let by_head = shape(NemoQkvLayout::Interleaved).reordered(key, &low).unwrap();
            let found = of_pair(by_head.clone());
            let starts = [0, model.heads * head_dim, (model.heads + kv_heads) * head_dim];
            for (row, values) in found.iter().enumerate() {
                let (part, own) = origin(row, &model, NemoQkvLayout::Interleaved);
                prop_assert_eq!(values, &by_part[starts[part] + own]);
            }
            let extents = by_head.b.extents();
            let bytes = by_head.b.dense(extents).bytes().into_owned();
            low.b = HostTensor::new(DType::F32, extents[1..].to_vec(), bytes).unwrap();
            low.rows = RowOrder::ByKvHead;
            let back = shape(NemoQkvLayout::Concatenated).reordered(key, &low).unwrap();
            prop_assert_eq!(of_pair(back), by_part);
        }
    }

    #[test]
    fn without_the_model_only_whole_parts_in_their_order_are_enough() {
        let keys = PARTS.map(|part| SiteKey::Layer(LayerIdx(0), part));
        let lows = [low(1, 4, 1.0), low(1, 2, 1.0), low(1, 2, 1.0)];
        let all = [Some(&lows[0]), Some(&lows[1]), Some(&lows[2])];
        let some = [Some(&lows[0]), None, Some(&lows[2])];
        let shape = |rows| Shape { model: None, rows };
        assert!(shape(NemoQkvLayout::Concatenated).members(true, &keys, &all).is_ok());
        for (rows, parts) in
            [(NemoQkvLayout::Interleaved, &all), (NemoQkvLayout::Concatenated, &some)]
        {
            let error = shape(rows).members(true, &keys, parts).err().unwrap();
            assert!(error.to_string().contains("--model"), "{error}");
        }
        let other = model(4, 2, 1);
        let shape = Shape { model: Some(&other), rows: NemoQkvLayout::Interleaved };
        assert!(shape.members(true, &keys, &all).is_ok());
        let shape = Shape { model: Some(&model(2, 2, 1)), ..shape };
        let error = shape.members(true, &keys, &all).err().unwrap().to_string();
        assert!(error.contains("4 rows of B") && error.contains("2 rows"), "{error}");
    }
}
