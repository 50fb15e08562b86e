//! Tensor parallelism with threads: two and four ranks give the results of transformers and PEFT, alone and
//! in one mixed batch.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use lora_core::{DType, LoraConfig, LoraRequest};
use lora_cpu_ref::CpuRef;
use loramux_engine::{GenerateRequest, Llm, LlmBuilder, LlmError};
use loramux_tests::{
    AdapterFiles, Case, Class, FieldAnswers, FileTensor, Fixtures, builder, context_logits,
    dense_field_cases, field_model, fixture_models, model_path, relative_error, run,
};

/// Another order of summation occasionally changes the e4m3 code of an activation.
const FP8: Class = Class { dtype: DType::F32, logits: 2e-2, tie: 0.1 };

fn start(builder: LlmBuilder, ranks: usize) -> Result<Llm, LlmError> {
    builder.tensor_parallel_size(ranks).build_ranks(|_| CpuRef::with_threads(Some(1)))
}

fn model_meets(model: &str, class: &Class) {
    let fixtures = Fixtures::load();
    let cases = fixtures.of_model(model);
    assert!(cases.len() >= 9, "{model} has {} cases", cases.len());
    let requests = Case::requests(&cases);
    for ranks in [2, 4] {
        let llm = start(builder(&model_path(model), class.dtype), ranks).expect("it starts");
        let mixed = run(&llm, requests.clone());
        for ((case, request), mixed) in cases.iter().zip(&requests).zip(&mixed) {
            let alone = &run(&llm, vec![request.clone()])[0];
            class.check(&fixtures, case, alone);
            assert_eq!(
                alone.context_logits, mixed.context_logits,
                "{}: the batch matters",
                case.id
            );
            assert_eq!(alone.outputs, mixed.outputs, "{}: the batch matters", case.id);
        }
    }
}

fixture_models! {
    model_meets;
    llama: "llama", Class::EXACT;
    llama_tied: "llama-tied", Class::EXACT;
    mistral: "mistral", Class::EXACT;
    qwen2: "qwen2", Class::EXACT;
    qwen3: "qwen3", Class::EXACT;
    llama_fp8: "llama-fp8", FP8;
}

/// All parts of adapters are sharded: full weights, rows of tokens, norms, DoRA on embeddings and `lm_head`.
#[test]
fn adapters_of_the_field_are_divided_too() {
    let mut wrong = Vec::new();
    for (model, cases) in dense_field_cases() {
        for ranks in [2, 4] {
            let builder = Llm::builder(field_model(&model))
                .dtype(Some(DType::F32))
                .lora_config(LoraConfig { max_loras: Some(64), ..LoraConfig::default() });
            let llm = start(builder, ranks).expect("it starts");
            for answers in FieldAnswers::of(&llm, cases.clone()) {
                wrong
                    .extend(answers.faults().iter().map(|fault| format!("{ranks} ranks: {fault}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// If outputs are summed over the ranks, only one rank may add a bias.
#[test]
fn a_bias_is_added_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = AdapterFiles::open("llama.all-r16-rslora");
    files.config["lora_bias"] = true.into();
    let biases: Vec<_> = files
        .tensors
        .iter()
        .filter(|(name, _)| name.ends_with("lora_B.weight"))
        .map(|(name, b)| {
            let values = (0..b.shape[0]).map(|i| (i % 7) as f32 * 0.125 - 0.375);
            (name.replace("weight", "bias"), FileTensor::bf16(&b.shape[..1], values))
        })
        .collect();
    assert_eq!(biases.len(), 21);
    files.tensors.extend(biases);
    files.write(dir.path());
    let request =
        |lora| GenerateRequest { lora, ..Case::request(&Fixtures::load().of_model("llama")[0], 1) };
    let biased = || request(Some(LoraRequest::new("biased", 1, dir.path())));
    let builder = || builder(&model_path("llama"), DType::F32);
    let one = builder().build(|| CpuRef::with_threads(Some(1))).unwrap();
    let expected = context_logits(&run(&one, vec![biased()])[0]);
    let plain = context_logits(&run(&one, vec![request(None)])[0]);
    assert!(relative_error(&plain, &expected) > 0.1, "the adapter matters");
    for ranks in [2, 4] {
        let llm = start(builder(), ranks).unwrap();
        let found = context_logits(&run(&llm, vec![biased()])[0]);
        assert!(relative_error(&found, &expected) < 1e-4, "{ranks} ranks");
    }
}

#[test]
fn a_model_that_cannot_be_divided_is_refused() {
    let refused = |ranks| {
        let error = start(builder(&model_path("llama"), DType::F32), ranks).err().unwrap();
        error.to_string()
    };
    let three = refused(3);
    assert!(
        three.contains("tensor_parallel_size") && three.contains("4 attention heads"),
        "{three}"
    );
    assert!(refused(0).contains("tensor_parallel_size"));
    let one = builder(&model_path("llama"), DType::F32).tensor_parallel_size(2);
    let error = one.build(|| CpuRef::with_threads(Some(1))).err().unwrap().to_string();
    assert!(error.contains("build_ranks"), "{error}");
}

#[test]
fn the_rank_that_fails_says_why() {
    let refuse = |rank| match rank {
        1 => Err(lora_core::Error::Device("rank 1 fails on purpose".to_owned())),
        _ => CpuRef::with_threads(Some(1)),
    };
    for ranks in [2, 4] {
        let builder = builder(&model_path("llama"), DType::F32).tensor_parallel_size(ranks);
        let error = builder.build_ranks(refuse).err().unwrap().to_string();
        assert!(error.contains("rank 1 fails on purpose"), "{error}");
    }
}

/// DoRA's norms of these weights are infinite, which every rank detects when it writes them.
#[test]
fn an_adapter_that_cannot_be_written_leaves_the_group_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = AdapterFiles::open("llama.dora-r8");
    let names: Vec<_> =
        files.tensors.keys().filter(|name| name.contains("down_proj")).cloned().collect();
    for name in names.iter().filter(|name| name.contains("lora_A") || name.contains("lora_B")) {
        let shape = files.tensors[name].shape.clone();
        files.tensors.insert(name.clone(), FileTensor::filled(&shape, 1e15));
    }
    files.write(dir.path());
    let case = Fixtures::load().of_model("llama").remove(0);
    let request = |lora| GenerateRequest { lora, ..case.request(1) };
    for ranks in [1, 2] {
        let llm = start(builder(&model_path("llama"), DType::F32), ranks).unwrap();
        let before = run(&llm, vec![request(None)]);
        let bad = request(Some(LoraRequest::new("bad", 1, dir.path())));
        let error = llm.generate_each(vec![bad], &mut |_| ()).remove(0).unwrap_err().to_string();
        assert!(error.contains("DoRA") && error.contains("norm inf"), "{ranks} ranks: {error}");
        assert_eq!(run(&llm, vec![request(None)])[0].outputs, before[0].outputs, "{ranks} ranks");
    }
}
