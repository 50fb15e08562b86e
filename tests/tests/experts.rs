//! Routed-expert adapters: all layouts of an adapter are read as the same adapter.

#![allow(clippy::unwrap_used, reason = "a fixture that cannot be read is a failed test")]

use std::collections::BTreeSet;

use lora_core::formats::{self, ReadOptions};
use lora_core::{Adapter, Code, ExpertLayout, LoraConfig, LowRank, SiteKey, SiteWeights};
use loramux_tests::{AdapterFiles, FileTensor, adapter_path, geometry};
use serde_json::json;

const MODELS: [&str; 2] = ["mixtral", "qwen3-moe"];

const TWINS: [(&str, ExpertLayout); 4] = [
    ("experts-r4", ExpertLayout::TargetParameters),
    ("experts-r4-peft-0.18", ExpertLayout::TargetParametersSwapped),
    ("experts-r4-stacked", ExpertLayout::Stacked),
    ("experts-r4-per-expert", ExpertLayout::PerExpert),
];

fn load(name: &str, options: &ReadOptions) -> Adapter {
    formats::load(&adapter_path(name), options).unwrap_or_else(|error| panic!("{error}"))
}

/// `scale * B A` of one expert, `[out, in]` in row-major order.
fn delta(low: &LowRank, expert: usize) -> Vec<f32> {
    let (&[_, rank, input], &[_, output, _]) = (low.a.shape(), low.b.shape()) else {
        panic!("stacks of three dimensions")
    };
    let (a, b) = (low.a.to_f32(), low.b.to_f32());
    let mut delta = vec![0.0; output * input];
    for o in 0..output {
        for r in 0..rank {
            let b = b[(expert * output + o) * rank + r] * low.scale;
            let row = &a[(expert * rank + r) * input..][..input];
            let out = &mut delta[o * input..][..input];
            out.iter_mut().zip(row).for_each(|(out, a)| *out += b * a);
        }
    }
    delta
}

#[test]
fn twins_have_the_same_delta_for_every_module_and_expert() {
    for model in MODELS {
        let experts = geometry(model).num_experts;
        let adapters = TWINS.map(|(twin, layout)| {
            let adapter = load(&format!("{model}.{twin}"), &ReadOptions::default());
            assert_eq!(adapter.source.expert_layout, Some(layout), "{model}.{twin}");
            adapter
        });
        let [reference, others @ ..] = &adapters;
        for other in others {
            assert!(other.sites.keys().eq(reference.sites.keys()));
            for ((key, ours), (_, theirs)) in reference.low_ranks().zip(other.low_ranks()) {
                let SiteKey::Layer(_, module) = key else { panic!("a layer") };
                for expert in (0..experts).filter(|_| module.is_routed_expert()) {
                    let (ours, theirs) = (delta(ours, expert), delta(theirs, expert));
                    let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
                    let worst = worst.fold(0.0, f32::max);
                    assert!(worst <= 1e-6, "{model} {key} expert {expert}: off by {worst}");
                    assert!(ours.iter().any(|v| v.abs() > 1e-3), "a delta of some size");
                }
            }
            // Bit-identical, as layouts only move elements.
            assert_eq!(other.generation, reference.generation);
        }
    }
}

#[test]
fn the_model_decides_nothing_that_the_file_shows() {
    for model in MODELS {
        for (twin, _) in TWINS {
            let name = format!("{model}.{twin}");
            let known = load(&name, &ReadOptions::default().for_model(geometry(model)));
            assert_eq!(known.check(&geometry(model), &LoraConfig::default()), []);
            assert_eq!(known.generation, load(&name, &ReadOptions::default()).generation);
        }
    }
}

#[test]
fn a_forced_layout_changes_the_weights_or_is_refused() {
    for (twin, found) in TWINS {
        let plain = load(&format!("mixtral.{twin}"), &ReadOptions::default());
        for layout in ExpertLayout::ALL.into_iter().filter(|layout| *layout != found) {
            let options = ReadOptions { moe_layout: Some(layout), ..ReadOptions::default() };
            match formats::load(&adapter_path(&format!("mixtral.{twin}")), &options) {
                Ok(adapter) => assert_ne!(adapter.generation, plain.generation),
                Err(error) => assert!(error.rejections().unwrap().has(Code::RoutedExpertLayout)),
            }
        }
    }
}

/// The adapter of these files, or the codes of its rejections.
fn read(files: &AdapterFiles, options: &ReadOptions) -> Result<Adapter, BTreeSet<Code>> {
    let dir = tempfile::tempdir().unwrap();
    files.write(dir.path());
    formats::load(dir.path(), options).map_err(|error| match error.rejections() {
        Some(rejections) => rejections.0.iter().map(|rejection| rejection.code).collect(),
        None => panic!("{error}"),
    })
}

const PLAIN: fn() -> ReadOptions = ReadOptions::default;

fn forced(layout: ExpertLayout) -> ReadOptions {
    ReadOptions { moe_layout: Some(layout), ..ReadOptions::default() }
}

fn of_model() -> ReadOptions {
    ReadOptions::default().for_model(geometry("mixtral"))
}

/// A different number for each index.
fn numbers(count: usize, from: usize) -> impl Iterator<Item = f32> {
    (0..count).map(move |i| ((i * 37 + from * 11) % 251) as f32 / 64.0 - 1.5)
}

/// An adapter of one layer with the given routed-expert tensors.
fn small(tensors: &[(&str, &[usize])], config: &serde_json::Value) -> AdapterFiles {
    let mut all = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []});
    all.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    let tensor = |(i, (name, shape)): (usize, &(&str, &[usize]))| {
        let values = numbers(shape.iter().product(), i);
        let name = format!("base_model.model.model.layers.0.mlp.experts.{name}");
        (name, FileTensor::bf16(shape, values))
    };
    AdapterFiles { config: all, tensors: tensors.iter().enumerate().map(tensor).collect() }
}

fn low_rank(adapter: &Adapter, module: &str) -> LowRank {
    let mut all = adapter.low_ranks();
    all.find(|(key, _)| key.module().unwrap().name() == module).unwrap().1.clone()
}

#[test]
fn fused_rows_are_halves_or_alternate() {
    let tensors: [(&str, &[usize]); 2] =
        [("gate_up_proj.lora_A", &[3, 2, 4]), ("gate_up_proj.lora_B", &[3, 6, 2])];
    let files = small(&tensors, &json!({"target_parameters": ["mlp.experts.gate_up_proj"]}));
    let b: Vec<f32> = numbers(36, 1).collect();
    let row = |expert: usize, row: usize| b[(expert * 6 + row) * 2..][..2].to_vec();
    let layouts = [
        (PLAIN(), ExpertLayout::Fused, [[0, 1, 2], [3, 4, 5]]),
        (
            forced(ExpertLayout::FusedInterleaved),
            ExpertLayout::FusedInterleaved,
            [[0, 2, 4], [1, 3, 5]],
        ),
    ];
    for (options, layout, [gate, up]) in layouts {
        let adapter = read(&files, &options).unwrap();
        assert_eq!(adapter.source.expert_layout, Some(layout));
        for (module, rows) in [("moe_h_to_4h", gate), ("moe_gate", up)] {
            let low = low_rank(&adapter, module);
            assert_eq!((low.a.shape(), low.b.shape()), (&[3, 2, 4][..], &[3, 3, 2][..]));
            let expected: Vec<f32> =
                (0..3).flat_map(|e| rows.map(|r| row(e, r)).concat()).collect();
            assert_eq!(low.b.to_f32(), expected);
        }
        let (gate, up) = (low_rank(&adapter, "moe_h_to_4h"), low_rank(&adapter, "moe_gate"));
        assert_eq!(gate.a.bytes().as_ptr(), up.a.bytes().as_ptr(), "A is in memory once");
    }
}

#[test]
fn gpt_oss_adapters_are_refused_unless_their_row_order_is_set() {
    let tensors: [(&str, &[usize]); 2] =
        [("gate_up_proj.lora_A", &[3, 2, 4]), ("gate_up_proj.lora_B", &[3, 6, 2])];
    let config = json!({
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "base_model_name_or_path": "openai/gpt-oss-20b",
    });
    let files = small(&tensors, &config);
    assert_eq!(read(&files, &PLAIN()).unwrap_err(), [Code::AmbiguousExpertLayout].into());
    assert!(read(&files, &forced(ExpertLayout::FusedInterleaved)).is_ok());
}

#[test]
fn a_side_that_all_experts_share_is_kept_once() {
    for shape in [&[2, 4][..], &[1, 2, 4]] {
        let tensors: [(&str, &[usize]); 2] =
            [("up_proj.lora_A.weight", shape), ("up_proj.lora_B.weight", &[3, 6, 2])];
        let adapter = read(&small(&tensors, &json!({"target_modules": ["up_proj"]})), &PLAIN());
        let adapter = adapter.unwrap();
        assert_eq!(adapter.source.expert_layout, Some(ExpertLayout::SharedOuter));
        assert_eq!(low_rank(&adapter, "moe_gate").a.shape(), [1, 2, 4]);
    }
    let tensors: [(&str, &[usize]); 2] =
        [("up_proj.lora_A.weight", &[2, 4]), ("up_proj.lora_B.weight", &[6, 2])];
    let files = small(&tensors, &json!({"target_modules": ["up_proj"]}));
    assert_eq!(read(&files, &PLAIN()).unwrap_err(), [Code::RoutedExpertLayout].into());
}

#[test]
fn a_single_parameter_is_identified_by_its_release_or_its_model() {
    // Three experts of rank 2, four inputs and four outputs: shapes are ambiguous.
    let tensors: [(&str, &[usize]); 2] = [("lora_A.weight", &[6, 4]), ("lora_B.weight", &[4, 6])];
    let layout = |version: Option<&str>, options: &ReadOptions| {
        let parameters = ["mlp.experts.down_proj"];
        let config = json!({"target_parameters": parameters, "peft_version": version});
        read(&small(&tensors, &config), options).map(|a| a.source.expert_layout.unwrap())
    };
    use ExpertLayout::{TargetParameters, TargetParametersSwapped};
    assert_eq!(layout(Some("0.19.1"), &PLAIN()), Ok(TargetParameters));
    assert_eq!(layout(Some("0.19.0"), &PLAIN()), Ok(TargetParametersSwapped));
    for unknown in [None, Some("main")] {
        assert_eq!(layout(unknown, &PLAIN()), Err([Code::AmbiguousExpertLayout].into()));
        for forced_layout in [TargetParameters, TargetParametersSwapped] {
            assert_eq!(layout(unknown, &forced(forced_layout)), Ok(forced_layout));
        }
    }
    // The model's intermediate size 96 and hidden size 64 show which side is which.
    for (a, b, expected) in [(96, 64, TargetParameters), (64, 96, TargetParametersSwapped)] {
        let tensors: [(&str, &[usize]); 2] =
            [("lora_A.weight", &[16, a]), ("lora_B.weight", &[b, 16])];
        let files = small(&tensors, &json!({"target_parameters": ["mlp.experts.down_proj"]}));
        let adapter = read(&files, &of_model()).unwrap();
        assert_eq!(adapter.source.expert_layout, Some(expected));
        assert_eq!(low_rank(&adapter, "moe_4h_to_h").a.shape(), [8, 2, 96]);
        let gate_up = json!({"target_parameters": ["mlp.experts.gate_up_proj"]});
        let wrong = read(&small(&tensors, &gate_up), &of_model()).unwrap_err();
        assert_eq!(wrong, [Code::RoutedExpertLayout].into());
    }
}

#[test]
fn columns_with_the_experts_slowest_are_read_when_asked_for() {
    let tensors: [(&str, &[usize]); 2] = [("lora_A.weight", &[6, 4]), ("lora_B.weight", &[5, 6])];
    let config = json!({"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.20.0"});
    let adapter = read(&small(&tensors, &config), &forced(ExpertLayout::UnslothExpertSlowest));
    let low = low_rank(&adapter.unwrap(), "moe_4h_to_h");
    let b: Vec<f32> = numbers(30, 1).collect();
    for (expert, out, rank) in [(0, 0, 1), (1, 4, 0), (2, 3, 1)] {
        let found = low.b.get_f32((expert * 5 + out) * 2 + rank);
        assert_eq!(found, b[out * 6 + expert * 2 + rank]);
    }
}

#[test]
fn experts_go_by_their_numbers_and_none_may_be_missing() {
    let whole = AdapterFiles::open("mixtral.experts-r4-per-expert");
    let without = |expert: &str| {
        let mut files = whole.clone();
        files.tensors.retain(|name, _| !name.contains(&format!(".experts.{expert}.")));
        files
    };
    for expert in ["0", "3", "7"] {
        let missing = BTreeSet::from([Code::MissingExperts]);
        assert_eq!(read(&without(expert), &of_model()).unwrap_err(), missing, "{expert}");
        let tolerant = ReadOptions { allow_missing_experts: true, ..of_model() };
        let adapter = read(&without(expert), &tolerant).unwrap();
        assert_eq!(adapter.check(&geometry("mixtral"), &LoraConfig::default()), []);
        let all = read(&whole, &of_model()).unwrap();
        let zero: usize = expert.parse().unwrap();
        for (key, low) in
            adapter.low_ranks().filter(|(k, _)| k.module().unwrap().is_routed_expert())
        {
            let SiteWeights { low_rank: Some(full), .. } = &all.sites[&key] else {
                panic!("{key}")
            };
            for e in 0..8 {
                let (found, full) = (delta(low, e), delta(full, e));
                assert!(if e == zero { found.iter().all(|v| *v == 0.0) } else { found == full });
            }
        }
    }
    // Without the model, the eighth expert is not known to be missing; the check against the model reports
    // it.
    let seven = read(&without("7"), &PLAIN()).unwrap();
    let codes: BTreeSet<Code> = seven
        .check(&geometry("mixtral"), &LoraConfig::default())
        .iter()
        .map(|rejection| rejection.code)
        .collect();
    assert_eq!(codes, [Code::MissingExperts].into());
}

#[test]
fn experts_of_unequal_rank_or_scale_are_refused() {
    let name = |expert: u32, side: &str| {
        format!(
            "base_model.model.model.layers.1.block_sparse_moe.experts.{expert}.w2.lora_{side}.weight"
        )
    };
    let mut files = AdapterFiles::open("mixtral.experts-r4-per-expert");
    files.tensors.insert(name(5, "A"), FileTensor::bf16(&[2, 96], numbers(192, 0)));
    files.tensors.insert(name(5, "B"), FileTensor::bf16(&[64, 2], numbers(128, 0)));
    assert_eq!(read(&files, &PLAIN()).unwrap_err(), [Code::ExpertRankMismatch].into());
    let mut files = AdapterFiles::open("mixtral.experts-r4-per-expert");
    files.config["alpha_pattern"] = json!({"layers.1.block_sparse_moe.experts.5.w2": 3});
    assert_eq!(read(&files, &PLAIN()).unwrap_err(), [Code::ExpertRankMismatch].into());
    files.config["alpha_pattern"] = json!({"layers.1.block_sparse_moe.experts.\\d.w2": 3});
    assert!(read(&files, &PLAIN()).is_ok());
}

#[test]
fn dora_on_experts_is_refused() {
    let mut files = AdapterFiles::open("mixtral.experts-r4-stacked");
    files.tensors.retain(|name, _| name.contains("experts"));
    files.config["use_dora"] = json!(true);
    assert_eq!(read(&files, &PLAIN()).unwrap_err(), [Code::DoraOnExperts].into());
}
