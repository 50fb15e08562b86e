//! The same adapter as safetensors, torch pickle and NeMo archive must be equal.

use lora_core::formats::{self, ReadOptions};
use lora_core::{
    Adapter, AdapterFormat, CkptSource, LoraConfig, NemoQkvLayout, RowOrder, SiteKey, TargetModule,
};
use loramux_tests::{adapter_path, ckpt_source, geometry};

use super::build::gzipped;

const TWINS: [(&str, AdapterFormat); 3] = [
    ("llama.qkv-tied", AdapterFormat::PeftSafetensors),
    ("llama.qkv-tied-bin", AdapterFormat::PeftTorch),
    ("llama.qkv-tied-nemo", AdapterFormat::Nemo),
];

fn options(name: &str) -> ReadOptions {
    ReadOptions::default().with_source(ckpt_source(name))
}

fn for_llama(name: &str) -> ReadOptions {
    options(name).for_model(geometry("llama"))
}

fn load(name: &str, options: &ReadOptions) -> Adapter {
    formats::load(&adapter_path(name), options).unwrap()
}

#[test]
fn an_adapter_is_the_same_in_every_container() {
    let safetensors = load(TWINS[0].0, &for_llama(TWINS[0].0));
    for (name, format) in TWINS {
        let adapter = load(name, &for_llama(name));
        assert_eq!(adapter.source.format, format);
        assert_eq!(adapter.source.path, adapter_path(name));
        assert_eq!((adapter.source.rank, adapter.source.alpha), (Some(8), Some(16.0)));
        assert_eq!(adapter.source.files.len(), 1);
        assert!(adapter.source.warnings.is_empty());
        assert_eq!(adapter.sites, safetensors.sites, "{name}");
        assert_eq!(adapter.generation, safetensors.generation, "{name}");
        assert_eq!(adapter.check(&geometry("llama"), &LoraConfig::default()), []);
    }
}

#[test]
fn fused_rows_stay_fused_without_a_model() {
    let adapter = load("llama.qkv-tied-nemo", &options("llama.qkv-tied-nemo"));
    assert_eq!(adapter.modules(), [TargetModule::AttnQkv].into());
    let rows = |adapter: &Adapter| adapter.low_ranks().map(|(_, low)| low.rows).collect::<Vec<_>>();
    assert_eq!(rows(&adapter), [RowOrder::ByKvHead; 3]);
    let concatenated = ReadOptions {
        nemo_qkv_layout: NemoQkvLayout::Concatenated,
        ..options("llama.qkv-tied-nemo")
    };
    let adapter = load("llama.qkv-tied-nemo", &concatenated);
    assert_eq!(rows(&adapter), [RowOrder::ByPart; 3]);
}

#[test]
fn the_order_of_fused_rows_decides_what_is_computed() {
    let name = "llama.qkv-tied-nemo";
    let interleaved = load(name, &for_llama(name));
    let concatenated =
        ReadOptions { nemo_qkv_layout: NemoQkvLayout::Concatenated, ..for_llama(name) };
    let concatenated = load(name, &concatenated);
    assert_ne!(interleaved.generation, concatenated.generation);
    let keys = |adapter: &Adapter| adapter.sites.keys().copied().collect::<Vec<SiteKey>>();
    assert_eq!(keys(&interleaved), keys(&concatenated));
    for ((key, one), (_, other)) in interleaved.low_ranks().zip(concatenated.low_ranks()) {
        assert_eq!(one.a, other.a);
        assert_eq!(one.b.shape(), other.b.shape());
        assert_ne!(one.b, other.b, "{key}");
    }
}

#[test]
fn a_compressed_archive_is_the_archive() {
    let name = "llama.qkv-tied-nemo";
    let dir = tempfile::tempdir().unwrap();
    let archive = std::fs::read(adapter_path(name).join("adapter.nemo")).unwrap();
    let path = dir.path().join("any.nemo");
    std::fs::write(&path, gzipped(&archive)).unwrap();
    let plain = load(name, &for_llama(name));
    for path in [&path, &dir.path().to_owned()] {
        let adapter = formats::load(path, &for_llama(name)).unwrap();
        assert_eq!(adapter.generation, plain.generation);
        assert_eq!(adapter.source.path, *path);
    }
}

#[test]
fn an_archive_in_lora_dir_settles_the_target_modules() {
    let config = LoraConfig {
        lora_dir: vec![adapter_path("llama.qkv-tied-nemo")],
        lora_ckpt_source: CkptSource::Nemo,
        ..LoraConfig::default()
    };
    let model = geometry("llama");
    let fused = formats::resolve_targets(config.clone(), None).unwrap();
    assert_eq!(fused.lora_target_modules, ["attn_qkv"]);
    let cut = formats::resolve_targets(config, Some(&model)).unwrap();
    assert_eq!(cut.lora_target_modules, ["attn_q", "attn_k", "attn_v"]);
    let adapter = load("llama.qkv-tied-nemo", &for_llama("llama.qkv-tied-nemo"));
    for config in [fused, cut] {
        assert_eq!(adapter.check(&model, &config), []);
    }
}
