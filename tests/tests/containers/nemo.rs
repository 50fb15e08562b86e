//! NeMo archives of every kind of module, and malformed archives.

use std::collections::BTreeSet;

use lora_core::formats::{self, AdapterError, ReadOptions};
use lora_core::{Adapter, CkptSource, Code, LoraConfig, TargetModule};
use loramux_tests::{adapter_path, geometry};
use tar::EntryType;

use super::build::{
    Member, TensorSpec, gzipped, source, state_dict, tarred, tarred_with, torch_file, torch_tensors,
};

const YAML: &str =
    "peft: {peft_scheme: lora, lora_tuning: {target_modules: [all], adapter_dim: 4, alpha: 2}}\n";

/// NeMo modules, with the `[rank, in]` and `[out, rank]` of their adapters on the fixture model `llama`.
const PAIRS: [(&str, [u32; 2], [u32; 2]); 4] = [
    ("self_attention.adapter_layer.lora_kqv_adapter", [4, 64], [128, 4]),
    ("self_attention.adapter_layer.lora_dense_attention_adapter", [4, 64], [64, 4]),
    ("mlp.adapter_layer.lora_hto4h_adapter", [4, 64], [352, 4]),
    ("mlp.adapter_layer.lora_4htoh_adapter", [4, 176], [64, 4]),
];

/// Names and shapes of tensors.
type Tensors = Vec<(String, Vec<u32>)>;

/// Names and shapes of all four pairs in three layers.
fn tensors() -> Tensors {
    let in_layer = |layer: usize| {
        PAIRS.into_iter().flat_map(move |(pair, a, b)| {
            let name = |half| format!("model.decoder.layers.{layer}.{pair}.{half}.weight");
            [(name("linear_in"), a.to_vec()), (name("linear_out"), b.to_vec())]
        })
    };
    (0..3).flat_map(in_layer).collect()
}

fn weights(tensors: &[(String, Vec<u32>)]) -> Vec<u8> {
    torch_tensors(&tensors.iter().map(|(n, shape)| (n.as_str(), &shape[..])).collect::<Vec<_>>())
}

fn archive(weights: &[u8], yaml: &str) -> Vec<u8> {
    tarred(&[
        Member::file("model_config.yaml", yaml.as_bytes()),
        Member::file("model_weights.ckpt", weights),
    ])
}

fn read(bytes: Vec<u8>) -> Result<Adapter, AdapterError> {
    let options = ReadOptions::default().for_model(geometry("llama"));
    formats::nemo::read_archive(&source("x.nemo", bytes), &options)
}

/// The codes with which an archive of these tensors and this configuration is refused.
fn codes(tensors: &[(String, Vec<u32>)], yaml: &str) -> BTreeSet<Code> {
    match read(archive(&weights(tensors), yaml)) {
        Ok(_) => BTreeSet::new(),
        Err(error) => match error.rejections() {
            Some(rejections) => rejections.0.iter().map(|rejection| rejection.code).collect(),
            None => panic!("{error}"),
        },
    }
}

/// The error of an archive with these members besides well-formed ones.
fn with_member(member: Member<'_>) -> String {
    let weights = weights(&tensors());
    let sound = ["model_weights.ckpt", "model_config.yaml"];
    let [weights, config] = [(sound[0], &weights[..]), (sound[1], YAML.as_bytes())];
    message(tarred(&[Member::file(weights.0, weights.1), Member::file(config.0, config.1), member]))
}

fn message(bytes: Vec<u8>) -> String {
    let error = read(bytes).unwrap_err().to_string();
    assert!(error.starts_with("x.nemo: "), "{error}");
    error
}

#[test]
fn every_module_that_nemo_adapts_is_read() {
    let adapter = read(archive(&weights(&tensors()), YAML)).unwrap();
    assert_eq!(adapter.modules(), geometry("llama").modules());
    assert_eq!(adapter.check(&geometry("llama"), &LoraConfig::default()), []);
    assert!(adapter.low_ranks().all(|(_, low)| low.scale == 0.5 && low.rank == 4));
    // Gate rows come before up rows in the file.
    let low = |module: TargetModule| {
        let mut all = adapter.low_ranks();
        all.find(|(key, _)| key.module() == Some(module)).unwrap().1.clone()
    };
    let (gate, up) = (low(TargetModule::MlpHTo4h), low(TargetModule::MlpGate));
    assert_eq!((gate.b.shape(), up.b.shape()), (&[176, 4][..], &[176, 4][..]));
    assert_eq!([&gate.b.bytes()[..], up.b.bytes()].concat(), super::build::bf16(352 * 4));
}

#[test]
fn without_alpha_the_scale_is_one() {
    let tensors = tensors();
    let scale = |yaml: &str| {
        let adapter = read(archive(&weights(&tensors), yaml)).unwrap();
        let scale = adapter.low_ranks().next().unwrap().1.scale;
        (scale, adapter.source.warnings.len())
    };
    assert_eq!(scale(&YAML.replace(", alpha: 2", "")), (1.0, 0));
    assert_eq!(scale(&YAML.replace(", adapter_dim: 4, alpha: 2", "")), (1.0, 0));
    assert_eq!(scale("hidden_size: 64\n"), (1.0, 1));
}

#[test]
fn each_rule_about_tensors_is_reported_by_its_own_code() {
    let changed = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors();
        change(&mut tensors);
        codes(&tensors, YAML)
    };
    assert_eq!(changed(&|_| ()), [].into());
    assert_eq!(changed(&|t| t[0].0.push('x')), [Code::UnknownTensor, Code::IncompletePair].into());
    assert_eq!(changed(&|t| drop(t.remove(1))), [Code::IncompletePair].into());
    let rename = |name: &str| name.replace("model.decoder", "other");
    assert_eq!(
        changed(&|t| (0..2).for_each(|i| t[i].0 = rename(&t[i].0))),
        [Code::SeveralAdapters].into()
    );
    assert_eq!(
        changed(&|t| t.push((rename(&t[0].0), vec![4, 64]))),
        [Code::SeveralAdapters, Code::DuplicateTensor].into()
    );
    assert_eq!(changed(&|t| t[1].1 = vec![128, 3]), [Code::TensorShape].into());
    assert_eq!(changed(&|t| t[1].1 = vec![512]), [Code::TensorShape].into());
    assert_eq!(
        changed(&|t| (t[0].1, t[1].1) = (vec![2, 64], vec![128, 2])),
        [Code::RankMismatch].into()
    );
    assert_eq!(changed(&|t| drop(t.drain(..2))), [Code::TargetWithoutWeights].into());
    assert_eq!(changed(&|t| drop(t.drain(..8))), [Code::TargetWithoutWeights].into());
}

#[test]
fn tensors_must_be_finite_floating_point_numbers() {
    let file = |class: &'static str, data: Vec<u8>| {
        let name = |half| format!("layers.0.{}.{half}.weight", PAIRS[3].0);
        let mut specs = [
            TensorSpec::plain(&name("linear_in"), 0, &[4, 176]),
            TensorSpec::plain(&name("linear_out"), 1, &[64, 4]),
        ];
        specs[1].class = class;
        let ckpt = torch_file(&state_dict(&specs), &[super::build::bf16(4 * 176), data]);
        let options = ReadOptions::default();
        let archive = source("x.nemo", archive(&ckpt, ""));
        let error = formats::nemo::read_archive(&archive, &options).unwrap_err();
        error.rejections().unwrap().0.iter().map(|r| r.code).collect::<Vec<_>>()
    };
    assert_eq!(file("BFloat16Storage", vec![0xff; 512]), [Code::NonFinite]);
    assert_eq!(file("LongStorage", vec![0; 2048]), [Code::TensorDtype]);
    // Together with A in bfloat16.
    assert_eq!(file("FloatStorage", vec![0xff; 1024]), [Code::NonFinite]);
    assert_eq!(file("DoubleStorage", vec![0xff; 2048]), [Code::NonFinite]);
}

#[test]
fn the_configuration_must_name_what_has_weights() {
    let tensors = tensors();
    let with = |from: &str, to: &str| codes(&tensors, &YAML.replace(from, to));
    assert_eq!(with("[all]", "[attention, mlp]"), [].into());
    assert_eq!(with("[all]", "[attention]"), [Code::WeightsWithoutTarget].into());
    assert_eq!(with("[all]", "[all], layer_selection: null"), [].into());
    assert_eq!(with("[all]", "[all], layer_selection: [1, 2, 3]"), [].into());
    assert_eq!(
        with("[all]", "[all], layer_selection: [1, 2]"),
        [Code::WeightsWithoutTarget].into()
    );
    assert_eq!(
        with("[all]", "[all], layer_selection: [2, 3, 4]"),
        [Code::WeightsWithoutTarget, Code::TargetWithoutWeights].into()
    );
    assert_eq!(with("adapter_dim: 4, ", ""), [Code::MissingConfigField].into());
    assert_eq!(with("adapter_dim: 4", "adapter_dim: 8"), [Code::RankMismatch].into());
    assert_eq!(with("alpha: 2", "alpha: 1e300"), [Code::InvalidConfigField].into());
    assert_eq!(with("alpha: 2", "alpha: 2, new: 1"), [Code::UnknownConfigField].into());
    assert_eq!(with("scheme: lora", "scheme: ptuning"), [Code::UnsupportedPeftType].into());
}

#[test]
fn members_that_an_adapter_does_not_have_are_refused_by_name() {
    let file = |name| with_member(Member::file(name, b""));
    let kind = |name, kind| with_member(Member { name, kind, data: b"" });
    let cases = [
        (file("../x"), "\"../x\" lies outside"),
        (file("/etc/x"), "\"/etc/x\" lies outside"),
        (file("optimizer.pt"), "\"optimizer.pt\""),
        (file("./model_weights.ckpt"), "two members model_weights.ckpt"),
        (file("model_weights/metadata.json"), "distributed checkpoint"),
        (kind("model_weights/", EntryType::Directory), "distributed checkpoint"),
        (file("mp_rank_00/model_weights.ckpt"), "tensor parallelism"),
        (kind("link", EntryType::Symlink), "\"link\" is a link"),
        (kind("link", EntryType::Link), "\"link\" is a link"),
        (kind("pipe", EntryType::Fifo), "\"pipe\" is of type"),
        (kind("holes", EntryType::GNUSparse), "\"holes\" is stored with holes"),
    ];
    for (message, part) in cases {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn tokenizers_and_folders_are_passed_over() {
    let weights = weights(&tensors());
    let bytes = tarred(&[
        Member { name: "./", kind: EntryType::Directory, data: b"" },
        Member::file("./model_config.yaml", YAML.as_bytes()),
        Member::file("./0a1b_tokenizer.model", b"x"),
        Member::file("./model_weights.ckpt", &weights),
    ]);
    let adapter = read(bytes).unwrap();
    let [warning] = &adapter.source.warnings[..] else { panic!("one warning") };
    assert!(warning.contains("0a1b_tokenizer.model"), "{warning}");
}

#[test]
fn extended_headers_are_read() {
    let weights = weights(&tensors());
    let members = [
        Member::file("model_config.yaml", YAML.as_bytes()),
        Member::file("model_weights.ckpt", &weights),
    ];
    // Python writes modification times in this form.
    let times = tarred_with(&[("mtime", b"1700000000.25")], &members);
    assert!(read(times).is_ok());
    let holes = tarred_with(&[("GNU.sparse.major", b"1")], &members);
    assert!(message(holes).contains("stored with holes"));
    let renamed = tarred_with(&[("path", b"../x")], &members);
    assert!(message(renamed).contains("lies outside"));
    let endless = tarred_with(&[("size", b"18446744073709551615")], &members);
    assert!(message(endless).contains("not a tar file"));
}

#[test]
fn broken_archives_are_refused() {
    let weights = weights(&tensors());
    let only = |name, data| message(tarred(&[Member::file(name, data)]));
    assert!(only("model_weights.ckpt", &weights).contains("model_config.yaml is missing"));
    assert!(only("model_config.yaml", YAML.as_bytes()).contains("model_weights.ckpt is missing"));
    assert!(message(Vec::new()).contains("model_weights.ckpt is missing"));
    assert!(message(vec![1; 2000]).contains("not a tar file"));
    let sound = archive(&weights, YAML);
    let cut = message(sound[..sound.len() / 2].to_vec());
    assert!(cut.contains("tar file") || cut.contains("ends within"), "{cut}");
    let large = format!("# {}\n{YAML}", "x".repeat(1 << 20));
    assert!(message(archive(&weights, &large)).contains("above the limit"));
    assert!(message(archive(&weights, "peft: [")).contains("model_config.yaml"));
    assert!(message(archive(b"no zip", YAML)).contains("zip"));
    let packed = gzipped(&sound);
    assert!(read(packed.clone()).is_ok());
    assert!(message(packed[..packed.len() / 2].to_vec()).contains("decompressed"));
    assert!(message(b"BZh91AY&SY".to_vec()).contains("bzip2"));
}

#[test]
fn an_archive_that_grows_without_measure_is_refused() {
    let zeros = vec![0; 1 << 20];
    let bomb: Vec<u8> = vec![gzipped(&zeros); 100].concat();
    let message = message(bomb);
    assert!(message.contains("decompresses to more than"), "{message}");
}

#[test]
fn an_endless_name_is_not_read() {
    let name = vec![b'x'; 17 << 20];
    let long = Member { name: "././@LongLink", kind: EntryType::GNULongName, data: &name };
    assert!(with_member(long).contains("larger than any adapter's"));
}

#[test]
fn a_folder_has_one_archive() {
    let dir = tempfile::tempdir().unwrap();
    let nemo = ReadOptions::default().with_source(CkptSource::Nemo);
    let load = || formats::load(dir.path(), &nemo).unwrap_err().to_string();
    assert!(load().contains("archive *.nemo"));
    let archive = adapter_path("llama.qkv-tied-nemo").join("adapter.nemo");
    for name in ["a.nemo", "b.nemo"] {
        std::fs::copy(&archive, dir.path().join(name)).unwrap();
    }
    assert!(load().contains("a.nemo, b.nemo"));
    let peft = formats::load(&adapter_path("llama.qkv-tied"), &nemo).unwrap_err().to_string();
    assert!(peft.contains("lora_ckpt_source: hf"), "{peft}");
    let absent = formats::load(&dir.path().join("absent"), &nemo).unwrap_err().to_string();
    assert!(absent.contains("absent"), "{absent}");
}
