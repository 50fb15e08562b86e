//! Rules about single configuration values.

use super::{Code, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: Code::UnknownTargetModule,
        name: "unknown-target-module",
        meaning: "`lora_target_modules` or `trtllm_modules_to_hf_modules` names a module that is \
                  not in the table of target modules.",
        remedy: "Correct the name; the message lists all of them. Target modules have names such \
                 as `attn_q`, not the Hugging Face name `q_proj`.",
    },
    Rule {
        code: Code::ModuleMapConflict,
        name: "module-map-conflict",
        meaning: "`trtllm_modules_to_hf_modules` gives one Hugging Face name to two target \
                  modules, or an empty name to one. A tensor of that name would be ambiguous.",
        remedy: "Give every target module names of its own.",
    },
    Rule {
        code: Code::SettingOutOfRange,
        name: "setting-out-of-range",
        meaning: "A number of the configuration is outside its range, such as a rank limit or a \
                  number of threads of 0.",
        remedy: "Set it inside the range that the message gives, or leave it out for its default.",
    },
    Rule {
        code: Code::UnsupportedSetting,
        name: "unsupported-setting",
        meaning: "A setting has a valid value that is not supported here. It is not ignored, as the \
                  engine would then do something else than configured.",
        remedy: "Use one of the values that the message allows, or leave the setting out.",
    },
    Rule {
        code: Code::SeveralLoraDirs,
        name: "several-lora-dirs",
        meaning: "`lora_dir` has more than one entry. It is only used to determine the target modules \
                  from one adapter, and does not register adapters.",
        remedy: "Keep one directory, and name the other adapters in requests.",
    },
];
