//! Adapters that are written in every layout and read again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "convert/arbitrary.rs"]
mod arbitrary;
#[path = "convert/nemo.rs"]
mod nemo;

use std::path::Path;

use arbitrary::{Experts, adapter, layout};
use lora_core::formats::write::{self, WriteError};
use lora_core::formats::{self, ReadOptions};
use lora_core::{
    Adapter, AdapterInfo, ExpertLayout, LayerIdx, LoraConfig, LowRank, ModuleNaming, NemoQkvLayout,
    RowOrder, Selector, SiteDiff, SiteKey, TargetModule, diff,
};
use loramux_tests::{adapter_path, fixtures_dir, geometry};
use proptest::prelude::*;

/// Layouts in which gate and up are fused.
fn is_fused(layout: ExpertLayout) -> bool {
    use ExpertLayout::*;
    !matches!(layout, PerExpert | Stacked | SharedOuter)
}

/// Read options for exactly this layout.
fn options(layout: ExpertLayout) -> ReadOptions {
    ReadOptions { moe_layout: Some(layout), ..ReadOptions::default() }
}

fn written(adapter: &Adapter, layout: ExpertLayout) -> Result<Adapter, WriteError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    if let Err(error) = write::peft(&path, adapter, layout) {
        assert!(!path.exists(), "nothing is left behind");
        return Err(error);
    }
    let names: Vec<_> = std::fs::read_dir(&path).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let config = std::fs::read_to_string(path.join("adapter_config.json")).unwrap();
    let read = formats::load(&path, &options(layout));
    Ok(read.unwrap_or_else(|error| panic!("{error}\n{config}")))
}

fn worst(diffs: &[SiteDiff], tolerance: f64) -> Option<&SiteDiff> {
    diffs.iter().find(|diff| !diff.is_same(tolerance))
}

/// Whether a layout can represent an adapter, by the documentation.
fn holds(layout: ExpertLayout, experts: &Experts) -> bool {
    let any = experts.sites > 0;
    match layout {
        ExpertLayout::PerExpert => !any || experts.count > 1,
        ExpertLayout::SharedOuter => !any || experts.one_side_shared,
        ExpertLayout::Fused | ExpertLayout::FusedInterleaved if any && !experts.gate_or_up => false,
        _ => !experts.gate_and_up_differ || !is_fused(layout),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_layout_gives_the_same_adapter_again((adapter, experts) in adapter(), layout in layout()) {
        let read = match written(&adapter, layout) {
            Ok(read) => read,
            Err(error) => {
                prop_assert!(!holds(layout, &experts), "{layout}: {error}");
                return Ok(());
            }
        };
        prop_assert!(holds(layout, &experts), "{layout} should have been refused");
        // Shared sides are duplicated and absent halves become zeros; everything else is bit-identical.
        let diffs = diff(&adapter, &read);
        prop_assert!(worst(&diffs, 0.0).is_none(), "{layout}: {:?}", worst(&diffs, 0.0));
        let dense = |adapter: &Adapter| {
            let routed = |key: &SiteKey| key.module().is_some_and(TargetModule::is_routed_expert);
            adapter.sites.clone().into_iter().filter(|(key, _)| !routed(key)).collect::<Vec<_>>()
        };
        prop_assert_eq!(dense(&adapter), dense(&read));
        if !is_fused(layout) && experts.shared == 0 {
            prop_assert_eq!(&adapter.sites, &read.sites);
            prop_assert_eq!(adapter.generation, read.generation);
        }
        if experts.sites > 0 {
            prop_assert_eq!(read.source.expert_layout, Some(layout));
        }
        prop_assert_eq!(&read.source.warnings, &Vec::<String>::new());
        // Converting the copy again must not change it.
        if !(layout == ExpertLayout::SharedOuter && experts.shared > 0) {
            prop_assert_eq!(written(&read, layout).unwrap().generation, read.generation);
        }
    }
}

/// Fixtures whose models exist.
fn fixtures() -> Vec<(String, String)> {
    let folders = std::fs::read_dir(fixtures_dir().join("adapters")).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let model = name.split_once('.').unwrap().0.to_owned();
        (name, model)
    };
    let peft = |name: &str| adapter_path(name).join("adapter_model.safetensors").is_file();
    folders.map(name).filter(|(name, _)| peft(name)).collect()
}

fn load(path: &Path, options: &ReadOptions) -> Adapter {
    formats::load(path, options).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_fixture_passes_the_check_of_its_model_in_every_layout() {
    for (name, model) in fixtures() {
        let source = load(&adapter_path(&name), &ReadOptions::default());
        let model = geometry(&model);
        assert_eq!(source.check(&model, &LoraConfig::default()), []);
        let layouts: Vec<ExpertLayout> = match source.source.expert_layout {
            Some(_) => ExpertLayout::ALL.into_iter().collect(),
            None => vec![ExpertLayout::PerExpert],
        };
        for layout in layouts {
            if layout == ExpertLayout::SharedOuter {
                assert!(written(&source, layout).unwrap_err().to_string().contains("stacked"));
                continue;
            }
            let read = written(&source, layout).unwrap();
            assert_eq!(read.check(&model, &LoraConfig::default()), [], "{name} as {layout}");
            assert_eq!(read.generation, source.generation, "{name} as {layout}");
            assert_eq!(read.source.base_model_name, source.source.base_model_name);
        }
    }
}

#[test]
fn an_adapter_without_a_declaration_gets_one_that_its_model_agrees_with() {
    for (name, model) in fixtures() {
        let mut source = load(&adapter_path(&name), &ReadOptions::default());
        source.declaration = None;
        let read = written(&source, ExpertLayout::PerExpert).unwrap();
        assert_eq!(read.check(&geometry(&model), &LoraConfig::default()), [], "{name}");
        assert_eq!(read.generation, source.generation, "{name}");
    }
}

#[test]
fn parts_that_were_cut_out_of_a_fused_module_are_written_apart() {
    let mut source = load(&adapter_path("llama.qkv-tied"), &ReadOptions::default());
    let declared = source.declaration.as_mut().unwrap();
    declared.targets = Selector::Names(vec!["qkv_proj".to_owned()]);
    for naming in declared.naming.values_mut() {
        *naming = ModuleNaming { path: "self_attn.qkv_proj".to_owned(), mapped_exactly: true };
    }
    let read = written(&source, ExpertLayout::PerExpert).unwrap();
    assert_eq!(read.check(&geometry("llama"), &LoraConfig::default()), []);
    assert_eq!(read.generation, source.generation);
}

#[test]
fn rows_that_only_a_model_can_cut_are_refused() {
    let source = load(&adapter_path("llama.qkv-tied"), &ReadOptions::default());
    let (_, low) = source.low_ranks().next().unwrap();
    let low = LowRank { rows: RowOrder::ByKvHead, ..low.clone() };
    let key = SiteKey::Layer(LayerIdx(0), TargetModule::AttnQkv);
    let fused = Adapter::new([(key, low.into())].into(), AdapterInfo::default(), None);
    let error = written(&fused, ExpertLayout::PerExpert).unwrap_err().to_string();
    assert!(error.contains("layer 0 attn_qkv") && error.contains("--model"), "{error}");
}

#[test]
fn layouts_of_the_oracle_are_written_to_the_byte() {
    use ExpertLayout::*;
    for model in ["mixtral", "qwen3-moe"] {
        let twins = [
            ("experts-r4", TargetParameters),
            ("experts-r4-peft-0.18", TargetParametersSwapped),
            ("experts-r4-stacked", Stacked),
            ("experts-r4-per-expert", PerExpert),
        ];
        for (twin, layout) in twins {
            let path = adapter_path(&format!("{model}.{twin}"));
            // With the other family's version, so that only the layout decides.
            let other = if layout == Stacked { "per-expert" } else { "stacked" };
            let source = adapter_path(&format!("{model}.experts-r4-{other}"));
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            write::peft(&out, &load(&source, &ReadOptions::default()), layout).unwrap();
            let tensors = |path: &Path| {
                let file = std::fs::read(path.join("adapter_model.safetensors")).unwrap();
                let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
                let tensors = tensors.tensors().into_iter();
                let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
                    (name, view.shape().to_vec(), view.data().to_vec())
                };
                let mut all: Vec<_> = tensors.map(tensor).collect();
                all.sort();
                all
            };
            assert!(tensors(&out) == tensors(&path), "{model} as {layout}");
        }
    }
}

#[test]
fn a_selection_that_says_the_same_is_kept() {
    let config = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
    };
    for name in ["llama.some-layers", "llama.attn-r8", "mixtral.experts-r4-stacked"] {
        let source = adapter_path(name);
        let adapter = load(&source, &ReadOptions::default());
        let dir = tempfile::tempdir().unwrap();
        write::peft(dir.path(), &adapter, ExpertLayout::Stacked).unwrap();
        for field in ["target_modules", "layers_to_transform", "layers_pattern"] {
            assert_eq!(config(dir.path())[field], config(&source)[field], "{name} {field}");
        }
        for field in ["r", "lora_alpha", "peft_version", "use_rslora"] {
            assert_eq!(config(dir.path())[field], config(&source)[field], "{name} {field}");
        }
    }
}

#[test]
fn a_directory_with_something_in_it_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mine"), "1").unwrap();
    let adapter = load(&adapter_path("llama.attn-r8"), &ReadOptions::default());
    let error = write::peft(dir.path(), &adapter, ExpertLayout::PerExpert).unwrap_err();
    assert!(matches!(error, WriteError::Exists { .. }));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// The configuration of a NeMo archive, and the storages of its checkpoint in the order in which
/// the pickle names them.
fn nemo_parts(path: &Path) -> (String, Vec<Vec<u8>>) {
    let mut tar = tar::Archive::new(std::fs::File::open(path).unwrap());
    let mut files = std::collections::BTreeMap::new();
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        files.insert(String::from_utf8(entry.path_bytes().into_owned()).unwrap(), bytes);
    }
    assert_eq!(files.keys().collect::<Vec<_>>(), ["./model_config.yaml", "./model_weights.ckpt"]);
    let checkpoint = std::io::Cursor::new(&files["./model_weights.ckpt"]);
    let mut zip = zip::ZipArchive::new(checkpoint).unwrap();
    let mut storages = Vec::new();
    while let Ok(mut file) = zip.by_name(&format!("archive/data/{}", storages.len())) {
        assert_eq!(file.compression(), zip::CompressionMethod::Stored);
        assert_eq!(file.data_start().unwrap() % 64, 0, "torch maps storages");
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
        storages.push(bytes);
    }
    (String::from_utf8(files["./model_config.yaml"].clone()).unwrap(), storages)
}

#[test]
fn the_nemo_twin_of_the_oracle_is_written_to_the_byte() {
    let source = load(&adapter_path("llama.qkv-tied"), &ReadOptions::default());
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter.nemo");
    let model = geometry("llama");
    write::nemo(&out, &source, Some(&model), NemoQkvLayout::Interleaved).unwrap();
    let twin = adapter_path("llama.qkv-tied-nemo").join("adapter.nemo");
    let (config, storages) = nemo_parts(&out);
    let (expected_config, expected) = nemo_parts(&twin);
    assert_eq!(config, expected_config);
    assert!(storages == expected && storages.len() == 6);
    let again = write::nemo(&out, &source, Some(&model), NemoQkvLayout::Interleaved);
    assert!(matches!(again, Err(WriteError::Exists { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left there");
}

#[test]
fn what_nemo_cannot_hold_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = geometry("llama");
    for (fixture, model, words) in [
        ("llama.dora-r8", Some(&model), "layer 0 attn_q"),
        ("llama.lora-bias", Some(&model), "bias of lora_B"),
        ("llama.lm-head-r8", Some(&model), "lm_head"),
        ("llama.embed-r8", Some(&model), "embed_tokens"),
        ("mixtral.experts-r4", None, "layer 0 moe_h_to_4h"),
        ("qwen2.bias-lora-only", None, "whole weight or bias"),
        ("llama.mixed-ranks", Some(&model), "layer 0 attn_q and layer 0 attn_k"),
        ("llama.all-r16-rslora", Some(&model), "layer 0 attention_qkv and layer 0 attention_dense"),
        ("llama.attn-r8", None, "--model"),
    ] {
        let source = load(&adapter_path(fixture), &ReadOptions::default());
        let out = dir.path().join("a.nemo");
        let error = write::nemo(&out, &source, model, NemoQkvLayout::Interleaved).unwrap_err();
        assert!(error.to_string().contains(words), "{fixture}: {error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
