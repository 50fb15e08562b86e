//! The modules that an adapter changes, with layers that are changed alike grouped together.

use lora_core::{Adapter, LowRank, SiteKey, SiteWeights};
use serde::Serialize;

/// Layers of one module that are changed in the same way.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Group {
    /// `embed_tokens`, a target module, or `lm_head`.
    pub module: String,
    /// Layers, ascending; empty for `embed_tokens` and `lm_head`.
    pub layers: Vec<u32>,
    /// The change, the same in every layer.
    #[serde(flatten)]
    pub change: Change,
}

/// The kind of change at a site, without its weights.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub(super) struct Change {
    /// Rank of the low-rank update, if any.
    pub rank: Option<usize>,
    /// Its scale.
    pub scale: Option<f32>,
    /// Number of routed experts; 1 if all experts share the update.
    pub experts: Option<usize>,
    /// Whether it has a DoRA magnitude.
    pub dora: bool,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// Whether the base layer's bias is replaced.
    pub base_bias: bool,
    /// Whether the base layer's weight is replaced.
    pub saved: bool,
    /// Number of vocabulary rows that are replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_rows: Option<usize>,
}

impl From<&SiteWeights> for Change {
    fn from(site: &SiteWeights) -> Self {
        let low = site.low_rank.as_ref();
        Self {
            rank: low.map(|low| low.rank),
            scale: low.map(|low| low.scale),
            experts: low.and_then(experts),
            dora: low.is_some_and(|low| low.magnitude.is_some()),
            lora_bias: low.is_some_and(|low| low.b_bias.is_some()),
            base_bias: site.base_bias.is_some(),
            saved: site.replacement.is_some(),
            token_rows: site.rows.as_ref().map(|rows| rows.ids.len()),
        }
    }
}

/// Number of experts if the update is a stack of matrices.
fn experts(low: &LowRank) -> Option<usize> {
    match (low.a.shape(), low.b.shape()) {
        (&[a, _, _], &[b, _, _]) => Some(a.max(b)),
        _ => None,
    }
}

impl Change {
    /// Everything beyond a plain low-rank update, in words.
    pub fn extras(&self) -> String {
        let experts = self.experts.map(|experts| match experts {
            1 => "1 expert".to_owned(),
            several => format!("{several} experts"),
        });
        let words = [
            (self.dora, "DoRA"),
            (self.lora_bias, "bias of lora_B"),
            (self.base_bias, "replaces the bias"),
            (self.saved, "replaces the weight"),
        ];
        let present = words.iter().filter(|(present, _)| *present).map(|(_, word)| (*word).into());
        let rows = self.token_rows.map(|count| format!("replaces the rows of {count} tokens"));
        experts.into_iter().chain(present).chain(rows).collect::<Vec<String>>().join(", ")
    }
}

/// The adapter's sites in groups: the embedding, then by module, then `lm_head`.
pub(super) fn groups(adapter: &Adapter) -> Vec<Group> {
    let mut groups: Vec<(u16, Group)> = Vec::new();
    for (key, site) in &adapter.sites {
        let change = Change::from(site);
        let (order, module, layer) = match *key {
            SiteKey::Embed => (0, key.to_string(), None),
            SiteKey::Layer(layer, module) => {
                (1 + u16::from(module.id()), module.to_string(), Some(layer.0))
            }
            SiteKey::Norm(layer, kind) => (300 + kind as u16, kind.to_string(), Some(layer.0)),
            SiteKey::FinalNorm => (400, key.to_string(), None),
            SiteKey::Head => (u16::MAX, key.to_string(), None),
        };
        let alike =
            |(_, group): &&mut (u16, Group)| group.module == module && group.change == change;
        match groups.iter_mut().find(alike) {
            Some((_, group)) => group.layers.extend(layer),
            None => {
                let layers = layer.into_iter().collect();
                groups.push((order, Group { module, layers, change }));
            }
        }
    }
    groups.sort_by_key(|(order, _)| *order);
    groups.into_iter().map(|(_, group)| group).collect()
}

/// Ascending numbers as ranges: `0-3, 7`.
pub(super) fn ranges(numbers: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => ranges.push((number, number)),
        }
    }
    let word = |(start, end): &(u32, u32)| {
        if start == end { start.to_string() } else { format!("{start}-{end}") }
    };
    ranges.iter().map(word).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora_core::{AdapterInfo, DType, HostTensor, LayerIdx, RowOrder, TargetModule};

    use super::*;

    #[test]
    fn neighbouring_numbers_become_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn layers_that_are_changed_alike_are_grouped() {
        let site = |rank: usize| {
            let tensor = |shape| HostTensor::from_f32(DType::F32, shape, &vec![1.0; rank]).unwrap();
            let low = LowRank {
                rank,
                scale: 2.0,
                a: tensor(vec![rank, 1]),
                b: tensor(vec![1, rank]),
                magnitude: None,
                b_bias: None,
                rows: RowOrder::ByPart,
            };
            SiteWeights { low_rank: Some(low), ..SiteWeights::default() }
        };
        let key = |layer, module| SiteKey::Layer(LayerIdx(layer), module);
        let sites = BTreeMap::from([
            (key(0, TargetModule::AttnQ), site(4)),
            (key(0, TargetModule::AttnV), site(4)),
            (key(1, TargetModule::AttnQ), site(4)),
            (key(2, TargetModule::AttnQ), site(8)),
            (SiteKey::Head, site(4)),
        ]);
        let groups = groups(&Adapter::new(sites, AdapterInfo::default(), None));
        let found: Vec<_> = groups
            .iter()
            .map(|g| (g.module.as_str(), ranges(&g.layers), g.change.rank.unwrap()))
            .collect();
        let expected = [
            ("attn_q", "0-1".to_owned(), 4),
            ("attn_q", "2".to_owned(), 8),
            ("attn_v", "0".to_owned(), 4),
            ("lm_head", String::new(), 4),
        ];
        assert_eq!(found, expected);
    }
}
