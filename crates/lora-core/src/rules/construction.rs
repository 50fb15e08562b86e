//! Rules about the configuration and the model, checked when an engine is built.

use super::{Code, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: Code::UnsupportedModel,
        name: "unsupported-model",
        meaning: "The base model has an architecture, a shape or a quantisation that is not supported, \
                  such as a vision-language model, or weights quantised by bitsandbytes, GPTQ or \
                  AWQ.",
        remedy: "Use the 16-bit checkpoint of a supported text model; `quant_algo: FP8` quantises it \
                 while it is loaded.",
    },
    Rule {
        code: Code::MoeBackend,
        name: "moe-backend",
        meaning: "LoRA targets routed experts while `moe_backend` is another than `CUTLASS` (or \
                  `AUTO`, which means `CUTLASS`). No other applies LoRA inside the experts.",
        remedy: "Set `moe_backend` to `CUTLASS`, or take the `moe_*` modules out of \
                 `lora_target_modules`.",
    },
    Rule {
        code: Code::QuantizedExperts,
        name: "quantized-experts",
        meaning: "LoRA targets routed experts while the base weights are quantised; it needs \
                  bfloat16 or float16 experts. A quantised KV cache alone is allowed.",
        remedy: "Load the checkpoint in 16 bits without `quant_algo`, or take the `moe_*` modules \
                 out of `lora_target_modules`.",
    },
    Rule {
        code: Code::IncompleteExpertModules,
        name: "incomplete-expert-modules",
        meaning: "LoRA targets routed experts without `moe_4h_to_h`, or with neither `moe_gate` \
                  nor `moe_h_to_4h`. At minimum the down projection and one of the two \
                  projections in front of it are targeted together.",
        remedy: "List `moe_gate` and `moe_4h_to_h` together in `lora_target_modules`, or none of \
                 the `moe_*` modules. An adapter need not have weights for each of them.",
    },
    Rule {
        code: Code::CompiledExperts,
        name: "compiled-experts",
        meaning: "LoRA targets routed experts while `register_to_config` has the model's layers \
                  compiled by `torch.compile`. Compiled code does not distinguish the adapters of \
                  tokens.",
        remedy: "Switch `register_to_config` and compilation off, or take the `moe_*` modules out \
                 of `lora_target_modules`.",
    },
];
