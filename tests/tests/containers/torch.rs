//! Malformed and unusual torch files.

use std::path::Path;

use lora_core::DType;
use lora_core::formats::{self, AdapterError, ElementType, RawTensors, ReadOptions};
use loramux_tests::adapter_path;
use zip::CompressionMethod;

use super::build::{
    TensorSpec, bf16, call, dict, global, int, parameter, source, state_dict, text, torch_file,
    torch_tensors, tuple, zipped,
};

fn parse(bytes: Vec<u8>) -> Result<RawTensors, AdapterError> {
    formats::torch::parse(&source("x.bin", bytes))
}

/// The error of a file; checks that the message has the file's name.
fn problem(bytes: Vec<u8>) -> String {
    let error = parse(bytes).unwrap_err();
    assert!(error.to_string().starts_with("x.bin: "), "{error}");
    match error {
        AdapterError::InvalidTorch { problem, .. } => problem,
        other => panic!("{other:?}"),
    }
}

fn problem_of_spec(change: impl FnOnce(&mut TensorSpec)) -> String {
    let mut spec = TensorSpec::plain("t", 0, &[2, 3]);
    change(&mut spec);
    problem(torch_file(&state_dict(&[spec]), &[bf16(6)]))
}

fn problem_of_value(value: Vec<u8>) -> String {
    problem(torch_file(&dict(&[(text("t"), value)]), &[bf16(6)]))
}

#[test]
fn tensors_are_ranges_of_the_file() {
    let mut part = TensorSpec::plain("part", 0, &[2, 2]);
    (part.storage.1, part.offset) = (6, 2);
    let shared = TensorSpec { name: "shared".into(), ..part.clone() };
    let mut double = TensorSpec::plain("double", 1, &[3]);
    double.class = "DoubleStorage";
    let empty = TensorSpec::plain("empty", 2, &[0, 4]);
    let file = torch_file(
        &state_dict(&[part.clone(), shared, double, empty]),
        &[bf16(6), vec![0; 24], Vec::new()],
    );
    let raw = parse(file).unwrap();
    assert_eq!(raw.tensors["part"].source().bytes().unwrap(), bf16(6)[4..]);
    assert_eq!(raw.tensors["part"].shape(), [2, 2]);
    assert_eq!(raw.tensors["part"].element(), &ElementType::Known(DType::Bf16));
    assert_eq!(raw.tensors["shared"].read().unwrap(), raw.tensors["part"].read().unwrap());
    assert_eq!(raw.tensors["double"].element(), &ElementType::Float64);
    assert!(raw.tensors["empty"].source().is_empty());
    part.offset = 0;
    let file = torch_file(&dict(&[(text("p"), parameter(&part))]), &[bf16(6)]);
    assert_eq!(parse(file).unwrap().tensors["p"].shape(), [2, 2]);
}

#[test]
fn doubles_of_an_adapter_are_rounded_to_floats() {
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let double = |part: &str, key: usize, shape: &[u32]| {
        let name = format!("{q}.{part}.weight");
        TensorSpec { class: "DoubleStorage", ..TensorSpec::plain(&name, key, shape) }
    };
    let bytes = |values: [f64; 2]| values.into_iter().flat_map(f64::to_le_bytes).collect();
    let state = state_dict(&[double("lora_A", 0, &[1, 2]), double("lora_B", 1, &[2, 1])]);
    let file = torch_file(&state, &[bytes([0.1, -1.0]), bytes([1e-60, 3.0])]);
    let config = br#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}"#;
    let (tensors, options) = (parse(file).unwrap(), ReadOptions::default());
    let adapter = formats::peft::read_parts(Path::new("x"), config, tensors, &options).unwrap();
    let (_, low) = adapter.low_ranks().next().unwrap();
    assert_eq!(low.a.to_f32(), [0.1, -1.0]);
    assert_eq!(low.b.to_f32(), [0.0, 3.0]);
}

#[test]
fn a_pickle_that_asks_for_more_than_tensors_is_called_by_that() {
    let calls = [("os", "system"), ("builtins", "eval"), ("numpy", "ndarray"), ("torch", "load")];
    for (module, name) in calls {
        let value = call(module, name, &[text("id")]);
        let error = parse(torch_file(&dict(&[(text("t"), value)]), &[])).unwrap_err();
        let AdapterError::ForbiddenGlobal { global, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*global, format!("{module}.{name}"));
        assert!(error.to_string().contains(global), "{error}");
    }
}

#[test]
fn what_is_no_tensor_is_named_with_its_key() {
    let values = [
        (int(1), "a whole number"),
        (text("x"), "a text"),
        (b"N".to_vec(), "None"),
        (b"}".to_vec(), "a dict"),
        (b"]".to_vec(), "a list"),
        (tuple(&[]), "a tuple"),
        (global("torch", "FloatStorage"), "a class"),
        (call("torch._utils", "_rebuild_parameter", &[]), "a built object"),
    ];
    for (value, kind) in values {
        let problem = problem_of_value(value);
        assert!(problem.contains("`t`") && problem.contains(kind), "{problem}");
    }
    assert!(problem(torch_file(b"\x80\x02].", &[])).contains("a list"));
    assert!(problem(torch_file(&dict(&[(int(1), int(2))]), &[])).contains("keys"));
    let twice = [TensorSpec::plain("t", 0, &[6]), TensorSpec::plain("t", 0, &[6])];
    assert!(problem(torch_file(&state_dict(&twice), &[bf16(6)])).contains("two values for `t`"));
}

#[test]
fn tensors_must_lie_in_their_storages_row_by_row() {
    let cases = [
        (problem_of_spec(|t| t.strides = vec![1, 2]), "contiguous"),
        (problem_of_spec(|t| t.strides = vec![3]), "strides"),
        (problem_of_spec(|t| t.offset = 1), "does not lie in its storage"),
        (problem_of_spec(|t| t.shape = vec![3, 3]), "does not lie in its storage"),
        (problem_of_spec(|t| t.storage.1 = 7), "has 12 bytes"),
        (problem_of_spec(|t| t.class = "FloatStorage"), "has 12 bytes"),
        (problem_of_spec(|t| t.storage.0 = "1".into()), "no entry data/1"),
        (problem_of_spec(|t| t.storage.0 = "../byteorder".into()), "no entry"),
        (problem_of_spec(|t| t.shape = vec![u32::MAX, 3]), "shape"),
        (problem_of_spec(|t| (t.shape, t.strides) = (vec![1; 9], vec![1; 9])), "shape"),
    ];
    for (problem, part) in cases {
        assert!(problem.contains("`t`") && problem.contains(part), "{problem}");
    }
    let huge = (i32::MAX as u32, i32::MAX as u32);
    let wide = problem_of_spec(|t| (t.shape, t.strides) = (vec![huge.0; 4], vec![1; 4]));
    assert!(wide.contains("`t`"), "{wide}");
}

#[test]
fn sharing_a_storage_is_bounded() {
    let specs: Vec<_> = (0..100)
        .map(|i| TensorSpec { name: format!("t{i}"), ..TensorSpec::plain("", 0, &[1 << 16]) })
        .collect();
    let file = torch_file(&state_dict(&specs), &[bf16(1 << 16)]);
    assert!(problem(file).contains("16 times"));
    assert!(parse(torch_file(&state_dict(&specs[..10]), &[bf16(1 << 16)])).is_ok());
}

#[test]
fn broken_containers_are_refused() {
    let sound = torch_tensors(&[("t", &[2, 3])]);
    for cut in [sound.len() - 1, sound.len() / 2, 40, 3, 0] {
        problem(sound[..cut].to_vec());
    }
    let pickle = state_dict(&[TensorSpec::plain("t", 0, &[6])]);
    let entries = [("a/data.pkl", &pickle[..]), ("a/data/0", &bf16(6))];
    let packed = zipped(&entries, CompressionMethod::Deflated);
    assert!(problem(packed).contains("a/data.pkl is compressed"));
    let zip = |entries: &[(&str, &[u8])]| zipped(entries, CompressionMethod::Stored);
    assert!(parse(zip(&entries)).is_ok());
    assert!(problem(zip(&entries[1..])).contains("0 entries */data.pkl"));
    let two = [entries[0], ("b/data.pkl", &pickle)];
    assert!(problem(zip(&two)).contains("2 entries"));
    let big = [entries[0], entries[1], ("a/byteorder", b"big")];
    assert!(problem(zip(&big)).contains("little-endian"));
    let script = [entries[0], entries[1], ("a/constants.pkl", b"")];
    assert!(problem(zip(&script)).contains("TorchScript"));
}

#[test]
fn files_of_old_releases_are_reported_from_other_files() {
    let old = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.";
    assert!(problem(old.to_vec()).contains("before release 1.6"));
    assert!(problem(b"neither of them".to_vec()).contains("not a zip file"));
}

#[test]
fn a_pickle_beside_safetensors_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |adapter: &str, file: &str| {
        std::fs::copy(adapter_path(adapter).join(file), dir.path().join(file)).unwrap()
    };
    copy("llama.qkv-tied", "adapter_config.json");
    let load = || formats::load(dir.path(), &ReadOptions::default());
    let missing = load().unwrap_err().to_string();
    assert!(missing.contains("adapter_model.safetensors"), "{missing}");
    let pth = dir.path().join("adapter_model.pth");
    let bin = adapter_path("llama.qkv-tied-bin").join("adapter_model.bin");
    std::fs::copy(&bin, &pth).unwrap();
    assert_eq!(load().unwrap().source.files, [pth]);
    std::fs::write(dir.path().join("adapter_model.bin"), b"broken").unwrap();
    assert!(load().unwrap_err().to_string().contains("adapter_model.bin"));
    copy("llama.qkv-tied", "adapter_model.safetensors");
    assert!(load().is_ok());
}

#[test]
fn the_largest_expert_adapters_are_within_the_limits() {
    const TENSORS: usize = 94 * 128 * 6;
    let name = |i: usize| {
        let (layer, expert) = (i / 768, i / 6 % 128);
        let stem = "base_model.model.model.layers";
        format!("{stem}.{layer}.mlp.experts.{expert}.gate_proj.lora_A.{}.weight", i % 6)
    };
    let specs: Vec<_> =
        (0..TENSORS).map(|key| TensorSpec::plain(&name(key), key, &[2, 3])).collect();
    let raw = parse(torch_file(&state_dict(&specs), &vec![bf16(6); TENSORS])).unwrap();
    assert_eq!(raw.tensors.len(), TENSORS);
}
