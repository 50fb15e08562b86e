//! Requirements of routed-expert LoRA, when an engine is built and at every step.
//!
//! The rules apply only if LoRA targets routed experts (`moe_h_to_4h`, `moe_gate`, `moe_4h_to_h`). Adapters
//! of attention or of shared experts work with any MoE backend, quantised base weights and CUDA graphs.
//! Rules about a single adapter are checked when it is loaded.

use std::collections::BTreeSet;

use lora_core::{Code, QuantAlgo, Rejection, TargetModule};

use crate::MoeBackendName;

/// How the layers of a model are executed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Execution {
    /// Op by op.
    #[default]
    Eager,
    /// `register_to_config` with `torch.compile`: compiled code, which does not support adapters.
    Compiled,
}

/// The part of an engine's configuration that matters for routed-expert LoRA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MoeSetup<'a> {
    /// The modules that adapters may change: `LoraConfig::effective_targets`.
    pub targets: &'a BTreeSet<TargetModule>,
    /// `moe_backend` as it was set; `AUTO` is resolved here.
    pub backend: MoeBackendName,
    /// Quantisation of the base weights, by the configuration or the checkpoint; `None` for 16-bit weights.
    /// That of the KV cache does not matter.
    pub weights: Option<QuantAlgo>,
    /// How layers are executed.
    pub execution: Execution,
}

/// Kernel choice of the experts: for throughput or for latency.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Schedule {
    /// The usual kernels.
    #[default]
    Throughput,
    /// Min-latency mode: kernels for few tokens, with the work of all experts in one launch.
    MinLatency,
}

/// Where a token's experts are computed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Dispatch {
    /// On every rank that holds the token.
    #[default]
    Local,
    /// On the ranks that hold its experts, to which tokens are sent (wide expert parallelism).
    Alltoall,
}

/// Whether a step is captured.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Capture {
    /// It is executed, possibly by replaying a graph.
    #[default]
    Idle,
    /// It is being captured into a CUDA graph.
    InProgress,
}

/// The part of a step that matters for routed-expert LoRA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MoeStep<'a> {
    /// The modules that adapters of this step's rows change; empty without adapters.
    pub modules: &'a BTreeSet<TargetModule>,
    /// Min-latency mode or not.
    pub schedule: Schedule,
    /// Whether tokens are sent to the ranks of their experts.
    pub dispatch: Dispatch,
    /// Whether the step is being captured.
    pub capture: Capture,
    /// The setting of this name, which allows captures; the kernels here support them.
    pub moe_lora_cuda_graph: bool,
}

/// The rules for building an engine; each returns a rejection if it is broken.
const CONSTRUCTION: [fn(&MoeSetup<'_>) -> Option<Rejection>; 4] =
    [moe_backend, base_weights, modules, execution];

/// The rules for every step.
const RUNTIME: [fn(&MoeStep<'_>) -> Option<Rejection>; 3] = [schedule, dispatch, capture];

/// Every rule that this engine would break; empty if it may be built.
pub fn check_construction(setup: &MoeSetup<'_>) -> Vec<Rejection> {
    if !touch_experts(setup.targets) {
        return Vec::new();
    }
    CONSTRUCTION.iter().filter_map(|rule| rule(setup)).collect()
}

/// Every rule that this step would break; empty if it may run.
pub fn check_step(step: &MoeStep<'_>) -> Vec<Rejection> {
    if !touch_experts(step.modules) {
        return Vec::new();
    }
    RUNTIME.iter().filter_map(|rule| rule(step)).collect()
}

fn touch_experts(modules: &BTreeSet<TargetModule>) -> bool {
    modules.iter().any(|module| module.is_routed_expert())
}

fn moe_backend(setup: &MoeSetup<'_>) -> Option<Rejection> {
    (setup.backend.resolve() != MoeBackendName::Cutlass).then(|| {
        Rejection::new(
            Code::MoeBackend,
            "moe_backend",
            format!("{} with LoRA on {}", setup.backend, experts(setup.targets)),
            "CUTLASS, or AUTO, which means CUTLASS",
            format!("set moe_backend to CUTLASS, or {}", without_experts(setup.targets)),
        )
    })
}

fn base_weights(setup: &MoeSetup<'_>) -> Option<Rejection> {
    let algorithm = setup.weights.filter(|algorithm| *algorithm != QuantAlgo::NoQuant)?;
    Some(Rejection::new(
        Code::QuantizedExperts,
        "quant_algo",
        format!("{algorithm} base weights with LoRA on {}", experts(setup.targets)),
        "bfloat16 or float16 base weights; kv_cache_quant_algo is free",
        format!("load the model in 16 bits, or {}", without_experts(setup.targets)),
    ))
}

/// The fused kernel applies LoRA to both of its GEMMs or to neither, so the down projection and the gate
/// and up projections cannot be targeted without each other.
fn modules(setup: &MoeSetup<'_>) -> Option<Rejection> {
    use TargetModule::{Moe4hToH, MoeGate, MoeHTo4h};
    let has = |module| setup.targets.contains(&module);
    let complete = has(Moe4hToH) && (has(MoeGate) || has(MoeHTo4h));
    (!complete).then(|| {
        Rejection::new(
            Code::IncompleteExpertModules,
            "lora_target_modules",
            format!("of routed experts only {}", experts(setup.targets)),
            "at minimum `moe_gate` + `moe_4h_to_h` together (`moe_h_to_4h` may stand for \
             `moe_gate` or beside it)",
            format!("list `moe_gate` + `moe_4h_to_h`, or {}", without_experts(setup.targets)),
        )
    })
}

fn execution(setup: &MoeSetup<'_>) -> Option<Rejection> {
    (setup.execution == Execution::Compiled).then(|| {
        Rejection::new(
            Code::CompiledExperts,
            "register_to_config",
            format!("true and torch.compile with LoRA on {}", experts(setup.targets)),
            "layers that are not compiled",
            format!(
                "switch register_to_config and torch_compile_config off, or {}",
                without_experts(setup.targets)
            ),
        )
    })
}

fn schedule(step: &MoeStep<'_>) -> Option<Rejection> {
    (step.schedule == Schedule::MinLatency).then(|| {
        Rejection::new(
            Code::MoeMinLatency,
            "enable_min_latency",
            format!("true in a step with LoRA on {}", experts(step.modules)),
            "false",
            "set enable_min_latency to false",
        )
    })
}

fn dispatch(step: &MoeStep<'_>) -> Option<Rejection> {
    (step.dispatch == Dispatch::Alltoall).then(|| {
        Rejection::new(
            Code::MoeAlltoall,
            "alltoall (WideEP)",
            format!("tokens sent to their experts' ranks with LoRA on {}", experts(step.modules)),
            "experts computed where the token is",
            "switch alltoall off, as a token does not take its adapter along",
        )
    })
}

fn capture(step: &MoeStep<'_>) -> Option<Rejection> {
    (step.capture == Capture::InProgress && !step.moe_lora_cuda_graph).then(|| {
        Rejection::new(
            Code::MoeGraphCapture,
            "moe_lora_cuda_graph",
            format!("false in a step that is captured, with LoRA on {}", experts(step.modules)),
            "eager steps, or true",
            "switch CUDA graphs off, or set moe_lora_cuda_graph: true",
        )
    })
}

/// The routed-expert modules among `modules`.
fn experts(modules: &BTreeSet<TargetModule>) -> String {
    let experts = modules.iter().filter(|module| module.is_routed_expert());
    experts.map(|module| module.name()).collect::<Vec<_>>().join(", ")
}

fn without_experts(targets: &BTreeSet<TargetModule>) -> String {
    format!("give lora_target_modules without {}", experts(targets))
}

#[cfg(test)]
mod tests {
    use TargetModule::{AttnQ, Moe4hToH, MoeGate, MoeHTo4h, MoeRouter, SharedExpertGate};
    use lora_core::Stage;

    use super::*;

    fn codes(rejections: &[Rejection]) -> Vec<Code> {
        rejections.iter().map(|r| r.code).collect()
    }

    fn setup(targets: &BTreeSet<TargetModule>) -> MoeSetup<'_> {
        MoeSetup {
            targets,
            backend: MoeBackendName::Auto,
            weights: None,
            execution: Execution::Eager,
        }
    }

    fn step(modules: &BTreeSet<TargetModule>) -> MoeStep<'_> {
        MoeStep {
            modules,
            schedule: Schedule::Throughput,
            dispatch: Dispatch::Local,
            capture: Capture::Idle,
            moe_lora_cuda_graph: false,
        }
    }

    #[test]
    fn nothing_is_refused_without_routed_experts() {
        let targets = BTreeSet::from([AttnQ, MoeRouter, SharedExpertGate]);
        let worst = MoeSetup {
            backend: MoeBackendName::Trtllm,
            weights: Some(QuantAlgo::Nvfp4),
            execution: Execution::Compiled,
            ..setup(&targets)
        };
        assert_eq!(check_construction(&worst), []);
        let worst = MoeStep {
            schedule: Schedule::MinLatency,
            dispatch: Dispatch::Alltoall,
            capture: Capture::InProgress,
            ..step(&targets)
        };
        assert_eq!(check_step(&worst), []);
    }

    #[test]
    fn only_cutlass_and_auto_serve_routed_experts() {
        let targets = BTreeSet::from([Moe4hToH, MoeGate]);
        for backend in MoeBackendName::all() {
            let found = check_construction(&MoeSetup { backend, ..setup(&targets) });
            let fits = matches!(backend, MoeBackendName::Auto | MoeBackendName::Cutlass);
            assert_eq!(found.is_empty(), fits, "{backend}");
            assert!(found.iter().all(|r| r.code == Code::MoeBackend));
            assert!(found.iter().all(|r| r.found.contains(backend.name())));
        }
    }

    #[test]
    fn every_algorithm_of_the_weights_is_refused() {
        let targets = BTreeSet::from([Moe4hToH, MoeHTo4h]);
        for algorithm in QuantAlgo::all() {
            let setup = MoeSetup { weights: Some(algorithm), ..setup(&targets) };
            let found = check_construction(&setup);
            assert_eq!(found.is_empty(), algorithm == QuantAlgo::NoQuant, "{algorithm}");
            assert!(found.iter().all(|r| r.found.contains(algorithm.name())));
        }
    }

    #[test]
    fn down_and_one_of_the_projections_in_front_of_it_are_the_minimum() {
        let all = [MoeHTo4h, Moe4hToH, MoeGate];
        for bits in 0..8 {
            let chosen = (0..3).filter(|i| bits >> i & 1 == 1).map(|i| all[i]);
            let targets: BTreeSet<TargetModule> = chosen.chain([AttnQ]).collect();
            let found = check_construction(&setup(&targets));
            let complete = targets.contains(&Moe4hToH) && targets.len() > 2;
            assert_eq!(found.is_empty(), complete || bits == 0, "{targets:?}");
            let quoted = |r: &Rejection| r.allowed.contains("`moe_gate` + `moe_4h_to_h`");
            assert!(found.iter().all(|r| r.code == Code::IncompleteExpertModules && quoted(r)));
        }
    }

    #[test]
    fn every_broken_rule_is_told() {
        let targets = BTreeSet::from([MoeGate]);
        let broken = MoeSetup {
            targets: &targets,
            backend: MoeBackendName::Wideep,
            weights: Some(QuantAlgo::Fp8),
            execution: Execution::Compiled,
        };
        use Code::{CompiledExperts, IncompleteExpertModules, QuantizedExperts};
        let expected =
            [Code::MoeBackend, QuantizedExperts, IncompleteExpertModules, CompiledExperts];
        assert_eq!(codes(&check_construction(&broken)), expected);
        assert!(expected.iter().all(|code| code.stage() == Stage::Construction));
        let broken = MoeStep {
            schedule: Schedule::MinLatency,
            dispatch: Dispatch::Alltoall,
            capture: Capture::InProgress,
            ..step(&targets)
        };
        let expected = [Code::MoeMinLatency, Code::MoeAlltoall, Code::MoeGraphCapture];
        assert_eq!(codes(&check_step(&broken)), expected);
        assert!(expected.iter().all(|code| code.stage() == Stage::Runtime));
    }

    #[test]
    fn the_setting_lifts_the_rule_about_graphs_and_no_other() {
        let modules = BTreeSet::from([Moe4hToH]);
        let capturing = MoeStep { capture: Capture::InProgress, ..step(&modules) };
        assert_eq!(codes(&check_step(&capturing)), [Code::MoeGraphCapture]);
        let lifted = MoeStep { moe_lora_cuda_graph: true, ..capturing };
        assert_eq!(check_step(&lifted), []);
        let alltoall = MoeStep { dispatch: Dispatch::Alltoall, ..lifted };
        assert_eq!(codes(&check_step(&alltoall)), [Code::MoeAlltoall]);
    }
}
