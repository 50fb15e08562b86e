//! Routed-expert adapters: every layout of one adapter is that adapter.

#![allow(clippy::unwrap_used, reason = "a fixture that cannot be read is a failed test")]

use lora_core::formats::{self, ReadOptions};
use lora_core::{Adapter, Code, ExpertLayout, LoraConfig, LowRank, SiteKey};
use polylora_tests::{adapter_path, geometry};

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
            // Bit for bit, too: layouts only move elements.
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
