//! NeMo archives, written and read back.

use std::collections::BTreeMap;

use lora_core::formats::write::{self, WriteError};
use lora_core::formats::{self, ReadOptions};
use lora_core::{
    Adapter, AdapterInfo, CkptSource, DType, HostTensor, LayerIdx, LoraConfig, LowRank,
    ModelGeometry, NemoQkvLayout, RowOrder, SiteKey, TargetModule, diff,
};
use loramux_tests::geometry;
use proptest::prelude::*;

use super::worst;

/// The modules that one NeMo module stands for, and whether it is a fused one.
const SLOTS: [&[TargetModule]; 4] = [
    &[TargetModule::AttnQ, TargetModule::AttnK, TargetModule::AttnV],
    &[TargetModule::AttnDense],
    &[TargetModule::MlpHTo4h, TargetModule::MlpGate],
    &[TargetModule::Mlp4hToH],
];

/// An adapter on the chosen modules in the chosen layers. The parts of a fused module share A, or are stacked with
/// their own ranks.
fn adapter(
    model: &ModelGeometry,
    layers: &[u32],
    slots: [bool; 4],
    absent: Option<TargetModule>,
) -> Adapter {
    let mut sites = BTreeMap::new();
    let mut next = 0u32;
    let mut tensor = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| {
                next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (next >> 16) as f32 / 65536.0 - 0.5
            })
            .collect();
        HostTensor::from_f32(DType::Bf16, shape.to_vec(), &values).unwrap()
    };
    for layer in layers {
        for (parts, _) in SLOTS.iter().zip(slots).filter(|(_, chosen)| *chosen) {
            let (input, _) = model.dims(parts[0]).unwrap();
            let a = tensor(&[4, input]);
            for part in parts.iter().filter(|part| Some(**part) != absent) {
                let (_, output) = model.dims(*part).unwrap();
                let (b, rows) = (tensor(&[output, 4]), RowOrder::ByPart);
                let (a, magnitude, b_bias) = (a.clone(), None, None);
                let low = LowRank { rank: 4, scale: 0.75, a, b, magnitude, b_bias, rows };
                sites.insert(SiteKey::Layer(LayerIdx(*layer), *part), low.into());
            }
        }
    }
    Adapter::new(sites, AdapterInfo::default(), None)
}

fn written(
    adapter: &Adapter,
    model: &ModelGeometry,
    rows: NemoQkvLayout,
) -> Result<Adapter, WriteError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.nemo");
    write::nemo(&path, adapter, Some(model), rows)?;
    let options = ReadOptions { nemo_qkv_layout: rows, ..ReadOptions::default() };
    let options = options.with_source(CkptSource::Nemo).for_model(model.clone());
    Ok(formats::load(&path, &options).unwrap_or_else(|error| panic!("{error}")))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn an_archive_gives_the_same_adapter_again(
        slots in any::<[bool; 4]>().prop_filter("some module", |slots| slots.contains(&true)),
        layers in proptest::sample::subsequence(vec![0u32, 1, 2], 1..=3),
        absent in proptest::option::of(proptest::sample::select(&[
            TargetModule::AttnQ, TargetModule::AttnV, TargetModule::MlpGate,
        ][..])),
        interleaved: bool,
    ) {
        let model = geometry("llama");
        let adapter = adapter(&model, &layers, slots, absent);
        let rows =
            if interleaved { NemoQkvLayout::Interleaved } else { NemoQkvLayout::Concatenated };
        let read = written(&adapter, &model, rows).unwrap();
        let diffs = diff(&adapter, &read);
        prop_assert_eq!(worst(&diffs, 0.0), None);
        prop_assert_eq!(read.check(&model, &LoraConfig::default()), []);
        if absent.is_none() {
            prop_assert_eq!(&adapter.sites, &read.sites);
        }
        prop_assert_eq!(&read.source.warnings, &Vec::<String>::new());
    }
}

#[test]
fn parts_with_their_own_a_have_their_ranks_stacked() {
    let model = geometry("llama");
    let mut adapter = adapter(&model, &[0, 1, 2], [true, false, false, false], None);
    for (key, site) in &mut adapter.sites {
        let own = match key.module() {
            Some(TargetModule::AttnK) => 2.0,
            Some(TargetModule::AttnV) => 3.0,
            _ => 1.0,
        };
        if let Some(low) = &mut site.low_rank {
            let values: Vec<f32> = low.a.iter_f32().map(|value| own * value).collect();
            low.a = HostTensor::from_f32(DType::Bf16, low.a.shape().to_vec(), &values).unwrap();
        }
    }
    let read = written(&adapter, &model, NemoQkvLayout::Interleaved).unwrap();
    assert_eq!(read.max_rank(), 12);
    assert_eq!(worst(&diff(&adapter, &read), 0.0), None);
}
