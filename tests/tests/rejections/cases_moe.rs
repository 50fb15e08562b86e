//! Engines and steps on which routed-expert LoRA is refused.

use std::collections::BTreeSet;

use lora_core::{Code, QuantAlgo, Rejection, TargetModule};
use loramux_moe::MoeBackendName;
use loramux_moe::rules::{
    Capture, Dispatch, Execution, MoeSetup, MoeStep, Schedule, check_construction, check_step,
};

use crate::Case;

/// The smallest set of expert modules that TensorRT-LLM's page allows, and attention.
const MODULES: [TargetModule; 3] =
    [TargetModule::AttnQ, TargetModule::MoeGate, TargetModule::Moe4hToH];

fn built(targets: &[TargetModule], change: impl FnOnce(&mut MoeSetup<'_>)) -> Vec<Rejection> {
    let targets = targets.iter().copied().collect();
    let mut setup = MoeSetup {
        targets: &targets,
        backend: MoeBackendName::Auto,
        weights: None,
        execution: Execution::Eager,
    };
    change(&mut setup);
    check_construction(&setup)
}

fn run(change: impl FnOnce(&mut MoeStep<'_>)) -> Vec<Rejection> {
    let modules = BTreeSet::from(MODULES);
    let mut step = MoeStep {
        modules: &modules,
        schedule: Schedule::Throughput,
        dispatch: Dispatch::Local,
        capture: Capture::Idle,
        moe_lora_cuda_graph: false,
    };
    change(&mut step);
    check_step(&step)
}

pub const CASES: &[Case] = &[
    (Code::MoeBackend, || built(&MODULES, |setup| setup.backend = MoeBackendName::Trtllm)),
    (Code::QuantizedExperts, || built(&MODULES, |setup| setup.weights = Some(QuantAlgo::Fp8))),
    (Code::IncompleteExpertModules, || built(&[TargetModule::MoeGate], |_| ())),
    (Code::CompiledExperts, || built(&MODULES, |setup| setup.execution = Execution::Compiled)),
    (Code::MoeMinLatency, || run(|step| step.schedule = Schedule::MinLatency)),
    (Code::MoeAlltoall, || run(|step| step.dispatch = Dispatch::Alltoall)),
    (Code::MoeGraphCapture, || run(|step| step.capture = Capture::InProgress)),
];
