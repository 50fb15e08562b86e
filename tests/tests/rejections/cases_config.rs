//! Configurations, models and requests that are refused by themselves.

use std::collections::BTreeMap;

use lora_core::{
    Code, HfNames, LoraConfig, LoraRequest, QuantAlgo, QuantConfig, validate_adapter_name,
};
use loramux_engine::BaseModel;

use crate::Case;

pub const CASES: &[Case] = &[
    (Code::UnknownTargetModule, || {
        let targets = vec!["attn_q".to_owned(), "q_proj".to_owned()];
        LoraConfig { lora_target_modules: targets, ..LoraConfig::default() }.validate()
    }),
    (Code::ModuleMapConflict, || {
        let both = |module: &str| (module.to_owned(), HfNames::One("q_proj".to_owned()));
        let map = BTreeMap::from([both("attn_q"), both("attn_k")]);
        LoraConfig { trtllm_modules_to_hf_modules: map, ..LoraConfig::default() }.validate()
    }),
    (Code::SettingOutOfRange, || {
        LoraConfig { max_lora_rank: 0, ..LoraConfig::default() }.validate()
    }),
    (Code::UnsupportedSetting, || {
        let kv_cache_quant_algo = Some(QuantAlgo::Fp8BlockScales);
        QuantConfig { kv_cache_quant_algo, ..QuantConfig::default() }.validate()
    }),
    (Code::SeveralLoraDirs, || {
        let lora_dir = vec!["sql".into(), "pirate".into()];
        LoraConfig { lora_dir, ..LoraConfig::default() }.validate()
    }),
    (Code::UnsupportedModel, || {
        let model = tempfile::tempdir().unwrap();
        let quantization = r#"{"quant_method": "gptq", "bits": 4, "group_size": 128}"#;
        let fields = r#""model_type": "llama", "vocab_size": 16, "hidden_size": 8,
            "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32"#;
        let config = format!(r#"{{{fields}, "quantization_config": {quantization}}}"#);
        std::fs::write(model.path().join("config.json"), config).unwrap();
        vec![BaseModel::read(model.path()).unwrap_err().rejection().unwrap()]
    }),
    (Code::InvalidAdapterName, || vec![validate_adapter_name("sql,pirate").unwrap_err()]),
    (Code::AdapterPath, || LoraRequest::new("sql", 0, "absent/sql").validate()),
];
