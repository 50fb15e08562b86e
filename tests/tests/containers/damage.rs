//! Damaged copies of real files are read or refused, but never crash the program.

use lora_core::formats::{self, ReadOptions};
use loramux_tests::{adapter_path, geometry};
use proptest::prelude::*;
use proptest::sample::Index;

use super::build::{gzipped, source};

/// Byte changes, and an optional length to truncate the file to.
fn damage() -> impl Strategy<Value = (Vec<(Index, u8)>, Option<Index>)> {
    let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 1..8);
    (changes, prop::option::weighted(0.2, any::<Index>()))
}

fn damaged(file: &[u8], (changes, cut): &(Vec<(Index, u8)>, Option<Index>)) -> Vec<u8> {
    let mut file = file.to_vec();
    for (at, byte) in changes {
        let at = at.index(file.len());
        file[at] = *byte;
    }
    if let Some(cut) = cut {
        file.truncate(cut.index(file.len()));
    }
    file
}

fn fixture(adapter: &str, file: &str) -> Vec<u8> {
    std::fs::read(adapter_path(adapter).join(file)).unwrap()
}

/// Reads a PEFT adapter with this weight file.
fn load(name: &str, bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let config = fixture("llama.qkv-tied", "adapter_config.json");
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    std::fs::write(dir.path().join(name), bytes).unwrap();
    let options = ReadOptions::default().for_model(geometry("llama"));
    if let Err(error) = formats::load(dir.path(), &options) {
        assert!(!error.to_string().is_empty());
    }
}

fn read_archive(bytes: Vec<u8>) {
    let options = ReadOptions::default().for_model(geometry("llama"));
    if let Err(error) = formats::nemo::read_archive(&source("x.nemo", bytes), &options) {
        assert!(error.to_string().contains("x.nemo"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn safetensors_files_may_be_damaged(damage in damage()) {
        let file = fixture("llama.qkv-tied", "adapter_model.safetensors");
        load("adapter_model.safetensors", &damaged(&file, &damage));
    }

    #[test]
    fn torch_files_may_be_damaged(damage in damage()) {
        let file = fixture("llama.qkv-tied-bin", "adapter_model.bin");
        load("adapter_model.bin", &damaged(&file, &damage));
    }

    #[test]
    fn nemo_archives_may_be_damaged(damage in damage()) {
        read_archive(damaged(&fixture("llama.qkv-tied-nemo", "adapter.nemo"), &damage));
    }

    #[test]
    fn compressed_archives_may_be_damaged(damage in damage()) {
        let file = gzipped(&fixture("llama.qkv-tied-nemo", "adapter.nemo"));
        read_archive(damaged(&file, &damage));
    }

    #[test]
    fn headers_and_pickles_may_be_damaged(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..4),
        tail in any::<bool>(),
    ) {
        // The directory of a zip file is at its end, the pickle at its start.
        let mut file = fixture("llama.qkv-tied-bin", "adapter_model.bin");
        let window = 2400.min(file.len());
        let start = if tail { file.len() - window } else { 0 };
        for (at, byte) in changes {
            file[start + at.index(window)] = byte;
        }
        load("adapter_model.bin", &file);
    }
}
