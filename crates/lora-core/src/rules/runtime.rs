//! Rules about requests and steps, checked as they run.

use super::{Code, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: Code::InvalidAdapterName,
        name: "invalid-adapter-name",
        meaning: "A request's `lora_name` is empty, starts with `/`, or has a comma or a control \
                  character. Metric labels, comma-separated lists and URLs could not carry it.",
        remedy: "Rename the adapter in the request; its files need no change.",
    },
    Rule {
        code: Code::AdapterPath,
        name: "adapter-path",
        meaning: "A request's `lora_path` is empty or does not exist on the machine that serves \
                  it.",
        remedy: "Give the path of the adapter as the server sees it.",
    },
    Rule {
        code: Code::MoeMinLatency,
        name: "moe-min-latency",
        meaning: "A step in min-latency mode has rows whose adapters change routed experts, for which \
                  that mode has no LoRA.",
        remedy: "Set `enable_min_latency` to false, or serve the adapter on an engine without it.",
    },
    Rule {
        code: Code::MoeAlltoall,
        name: "moe-alltoall",
        meaning: "A step that sends tokens to the ranks of their experts (alltoall, wide expert \
                  parallelism) has rows whose adapters change routed experts. The adapter of a token \
                  is not sent along with it.",
        remedy: "Run the experts without alltoall, or serve the adapter on an engine that does.",
    },
    Rule {
        code: Code::MoeGraphCapture,
        name: "moe-graph-capture",
        meaning: "A step that is being captured into a CUDA graph has rows whose adapters change \
                  routed experts. Routed-expert LoRA runs eagerly unless the configuration says \
                  otherwise.",
        remedy: "Switch CUDA graphs off, or set `moe_lora_cuda_graph: true`: the kernels here can \
                 be captured.",
    },
];
