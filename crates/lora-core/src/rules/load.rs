//! Rules about adapters, checked when they are loaded.

use super::{Code, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: Code::UnsupportedPeftType,
        name: "unsupported-peft-type",
        meaning: "`adapter_config.json` has another `peft_type` than `LORA`, such as LoHa, LoKr, \
                  VeRA or X-LoRA, whose tensors have another meaning.",
        remedy: "Convert the adapter to LoRA, for instance by an SVD of its weight change.",
    },
    Rule {
        code: Code::UnsupportedConfigField,
        name: "unsupported-config-field",
        meaning: "A field of `adapter_config.json` asks for something that would change what the \
                  adapter computes and is not supported.",
        remedy: "Follow the remedy in the message; usually the adapter must be trained or exported \
                 again without the field.",
    },
    Rule {
        code: Code::UnknownConfigField,
        name: "unknown-config-field",
        meaning: "`adapter_config.json` has an unknown field with a value. It could change what the \
                  adapter computes, so it is not ignored.",
        remedy: "Remove the field, or set `allow_unknown_fields: true` if it does not matter for \
                 inference.",
    },
    Rule {
        code: Code::MissingConfigField,
        name: "missing-config-field",
        meaning: "A field of `adapter_config.json` that the arithmetic needs, such as `r` or \
                  `lora_alpha`, is absent or null.",
        remedy: "Export the adapter again: PEFT always writes it.",
    },
    Rule {
        code: Code::InvalidConfigField,
        name: "invalid-config-field",
        meaning: "A field of `adapter_config.json` has a value of a wrong type, out of range, or \
                  in contradiction to another field.",
        remedy: "Correct `adapter_config.json`, or export the adapter again.",
    },
    Rule {
        code: Code::InvalidPattern,
        name: "invalid-pattern",
        meaning: "A pattern of `adapter_config.json` is not a regular expression of Python, or has \
                  conditional groups, octal escapes or verbose flags, which are not supported.",
        remedy: "Correct the pattern, or write the module names out in full instead of it.",
    },
    Rule {
        code: Code::PatternTooComplex,
        name: "pattern-too-complex",
        meaning: "A pattern of `adapter_config.json` backtracks too often on the name of a module, or \
                  is too large together with the others of its field.",
        remedy: "Simplify the pattern, or write the module names out in full instead of it.",
    },
    Rule {
        code: Code::MutatedBaseWeights,
        name: "mutated-base-weights",
        meaning: "`init_lora_weights` names a method, such as PiSSA, OLoRA or CorDA, that changes \
                  the base weights during training. A and B fit weights that the served model does \
                  not have.",
        remedy: "Convert the adapter to plain LoRA with PEFT's `save_pretrained` and \
                 `path_initial_model_for_weight_conversion`.",
    },
    Rule {
        code: Code::UnknownTensor,
        name: "unknown-tensor",
        meaning: "A tensor's name does not follow PEFT's grammar, so it cannot be applied. No \
                  tensor is left out silently.",
        remedy: "Export the adapter with PEFT, or remove the tensor if it belongs to something \
                 else.",
    },
    Rule {
        code: Code::WrappedNames,
        name: "wrapped-names",
        meaning: "The names of tensors have a prefix from a wrapper of the model, such as \
                  `_orig_mod.` (torch.compile), `module.` (data parallel) or \
                  `_fsdp_wrapped_module.`.",
        remedy: "Save the adapter from the model inside the wrapper, with PEFT's `save_pretrained`.",
    },
    Rule {
        code: Code::MultimodalNames,
        name: "multimodal-names",
        meaning: "The tensors belong to a multimodal model, of which the text model is a part. Only \
                  text models are supported.",
        remedy: "Train the adapter on the text model, or serve it where the multimodal model runs.",
    },
    Rule {
        code: Code::ForeignNames,
        name: "foreign-names",
        meaning: "The tensors are named as MLX, torchtune, Megatron or a trainer of image models \
                  names them. Their layout differs from PEFT's.",
        remedy: "Export the adapter to PEFT's format by the program that wrote it.",
    },
    Rule {
        code: Code::PartitionedTensors,
        name: "partitioned-tensors",
        meaning: "All tensors are empty, as they are if a model that DeepSpeed ZeRO stage 3 has \
                  partitioned is saved without gathering its parameters.",
        remedy: "Gather the parameters, and save the adapter again.",
    },
    Rule {
        code: Code::UnknownModule,
        name: "unknown-module",
        meaning: "A tensor belongs to a module that is not in the map of module names, or one module \
                  has two names in the file.",
        remedy: "Map the name with `trtllm_modules_to_hf_modules`, or export the adapter again.",
    },
    Rule {
        code: Code::DuplicateTensor,
        name: "duplicate-tensor",
        meaning: "Two tensors of the adapter claim the same role, so that one of them would be \
                  lost; or copies of one weight disagree.",
        remedy: "Export the adapter again with one tensor for each role.",
    },
    Rule {
        code: Code::SeveralAdapters,
        name: "several-adapters",
        meaning: "The tensors are named as those of several adapters, or under several prefixes.",
        remedy: "Save each adapter into a directory of its own.",
    },
    Rule {
        code: Code::RoutedExpertLayout,
        name: "routed-expert-layout",
        meaning: "The tensors of routed experts are in no known layout, or not in the one that \
                  `moe_layout` states.",
        remedy: "Take `moe_layout` out of the configuration or correct it; else export the adapter \
                 with one pair of matrices for each expert.",
    },
    Rule {
        code: Code::AmbiguousExpertLayout,
        name: "ambiguous-expert-layout",
        meaning: "The tensors of routed experts fit more than one layout, and neither their shapes \
                  nor `peft_version` show which it is. The wrong one would give wrong answers \
                  without an error.",
        remedy: "Set `moe_layout` to the layout that the adapter was written in.",
    },
    Rule {
        code: Code::ExpertRankMismatch,
        name: "expert-rank-mismatch",
        meaning: "The experts of one module have unequal ranks or scales. They are one stack of \
                  matrices with one rank and one scale.",
        remedy: "Train the experts of a module with one rank and one alpha, or make the smaller \
                 ranks equal by padding A and B with zeros and scaling B.",
    },
    Rule {
        code: Code::MissingExperts,
        name: "missing-experts",
        meaning: "The adapter has weights for some experts of a module and none for others, which \
                  usually means that the export is damaged.",
        remedy: "Export the adapter again, or set `allow_missing_experts: true` to leave those \
                 experts unchanged.",
    },
    Rule {
        code: Code::IncompletePair,
        name: "incomplete-pair",
        meaning: "A `lora_A` has no `lora_B`, or the other way round.",
        remedy: "Export the adapter again with both.",
    },
    Rule {
        code: Code::TensorShape,
        name: "tensor-shape",
        meaning: "A tensor has a wrong number of dimensions, is empty, or contradicts the tensor \
                  that it goes with.",
        remedy: "Export the adapter again; A is `[rank, in]` and B is `[out, rank]`.",
    },
    Rule {
        code: Code::TensorDtype,
        name: "tensor-dtype",
        meaning: "A tensor is not float32, float16, bfloat16 or float64, of which the last is rounded \
                  to float32.",
        remedy: "Convert the adapter to one of those types.",
    },
    Rule {
        code: Code::NonFinite,
        name: "non-finite",
        meaning: "A tensor holds NaN or infinity, or a float64 beyond the range of float32, which \
                  would spoil every answer.",
        remedy: "Train the adapter again: its training diverged.",
    },
    Rule {
        code: Code::RankMismatch,
        name: "rank-mismatch",
        meaning: "A tensor's rank is not the one that `r` and `rank_pattern` state. The scale depends \
                  on the rank.",
        remedy: "Correct `r` or `rank_pattern` in `adapter_config.json`.",
    },
    Rule {
        code: Code::UndeclaredTensor,
        name: "undeclared-tensor",
        meaning: "The file has a tensor that `adapter_config.json` does not declare, such as a \
                  bias with `bias: \"none\"`.",
        remedy: "Correct `adapter_config.json`, or export the adapter again.",
    },
    Rule {
        code: Code::MissingTensor,
        name: "missing-tensor",
        meaning: "The file lacks a tensor that `adapter_config.json` declares, such as a module of \
                  `modules_to_save`.",
        remedy: "Export the adapter again with it.",
    },
    Rule {
        code: Code::LoraBiasOnEmbedding,
        name: "lora-bias-on-embedding",
        meaning: "`lora_bias` is combined with LoRA on `embed_tokens`, which PEFT does not do.",
        remedy: "Leave `embed_tokens` out of `target_modules`, or train it without `lora_bias`.",
    },
    Rule {
        code: Code::DoraOnExperts,
        name: "dora-on-experts",
        meaning: "DoRA is combined with LoRA on routed experts, which take plain LoRA only.",
        remedy: "Train the adapter with `use_dora: false`, or leave the experts out of its \
                 targets.",
    },
    Rule {
        code: Code::LayerOutOfRange,
        name: "layer-out-of-range",
        meaning: "The adapter changes a layer that the model does not have.",
        remedy: "Load the adapter on the model that it was trained for.",
    },
    Rule {
        code: Code::RankOverLimit,
        name: "rank-over-limit",
        meaning: "A rank of the adapter is above `max_lora_rank`.",
        remedy: "Raise `max_lora_rank` to the adapter's largest rank.",
    },
    Rule {
        code: Code::ModuleNotServed,
        name: "module-not-served",
        meaning: "The adapter changes a module that `lora_target_modules` does not list.",
        remedy: "Add the module to `lora_target_modules`, or leave the setting out to serve all \
                 modules of the model.",
    },
    Rule {
        code: Code::ModuleNotInModel,
        name: "module-not-in-model",
        meaning: "The adapter changes a module that the model does not have under the file's name \
                  for it.",
        remedy: "Load the adapter on the model that it was trained for, or map its names with \
                 `trtllm_modules_to_hf_modules`.",
    },
    Rule {
        code: Code::VocabularyMismatch,
        name: "vocabulary-mismatch",
        meaning: "The adapter was trained on a vocabulary of another size than the model's. Its \
                  tokens would have no rows in the model, or the other way round.",
        remedy: "Serve the adapter on a model whose embeddings were resized to its vocabulary, or \
                 save the rows of added tokens with `trainable_token_indices`.",
    },
    Rule {
        code: Code::ShapeMismatch,
        name: "shape-mismatch",
        meaning: "A tensor does not fit the dimensions of the model.",
        remedy: "Load the adapter on the model that it was trained for.",
    },
    Rule {
        code: Code::TargetWithoutWeights,
        name: "target-without-weights",
        meaning: "The configuration of a NeMo archive names a module or a layer for which the archive \
                  has no weights. Part of the adapter is missing.",
        remedy: "Export the adapter again, or correct `target_modules` and `layer_selection`.",
    },
    Rule {
        code: Code::WeightsWithoutTarget,
        name: "weights-without-target",
        meaning: "The file has weights of a module that `adapter_config.json` does not target. \
                  One of the two probably belongs to another adapter.",
        remedy: "Export the adapter again, or correct `target_modules`.",
    },
    Rule {
        code: Code::NoopAdapter,
        name: "noop-adapter",
        meaning: "The adapter would change nothing: it has no weights, or every B, every A or \
                  every scale is zero. A freshly initialised adapter is the usual cause; a \
                  `lora_alpha` of 0 is another.",
        remedy: "Train the adapter, or set `allow_noop_adapter: true` to serve it all the same.",
    },
    Rule {
        code: Code::TiedEmbeddings,
        name: "tied-embeddings",
        meaning: "`ensure_weight_tying` says that `embed_tokens` and `lm_head` are updated together, \
                  and the file updates only one of them, or each in its own way.",
        remedy: "Export the adapter again.",
    },
    Rule {
        code: Code::BiasNotInModel,
        name: "bias-not-in-model",
        meaning: "The adapter replaces the bias of a layer that has none in this model.",
        remedy: "Load the adapter on the model that it was trained for.",
    },
    Rule {
        code: Code::OtherVocabulary,
        name: "other-vocabulary",
        meaning: "The `tokenizer.json` beside the adapter has other tokens at ids of the model's own \
                  vocabulary. It belongs to another model, and so may the adapter.",
        remedy: "Serve the adapter on the model that it was trained for. Else set \
                 `adapter_tokenizer: base` to use the model's tokenizer, or `adapter_tokenizer: \
                 adapter` if the adapter's is right.",
    },
    Rule {
        code: Code::TokensWithoutRows,
        name: "tokens-without-rows",
        meaning: "The tokenizer or an end token beside the adapter has ids beyond the model's \
                  vocabulary, for which the model has no rows. A padding token is exempt, as no \
                  request needs it.",
        remedy: "Serve the adapter on the model with the resized vocabulary that it was trained on, \
                 or set `adapter_tokenizer: base` to do without those tokens.",
    },
    Rule {
        code: Code::UnknownEndToken,
        name: "unknown-end-token",
        meaning: "`eos_token` in the `tokenizer_config.json` beside the adapter is not a token of the \
                  tokenizer, so that answers would not end where they should.",
        remedy: "Save the adapter's tokenizer again with its `tokenizer.json`, or set \
                 `adapter_tokenizer: base` to use the model's end tokens.",
    },
    Rule {
        code: Code::AddedTokensAlone,
        name: "added-tokens-alone",
        meaning: "`added_tokens.json` beside the adapter has tokens that the model's tokenizer lacks, \
                  but the folder has no `tokenizer.json`, without which text cannot be tokenized.",
        remedy: "Save the adapter's tokenizer again as a fast tokenizer, which writes \
                 `tokenizer.json`, or set `adapter_tokenizer: base`.",
    },
];
