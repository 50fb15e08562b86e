//! Models in GGUF files, read by candle. Weights are dequantised and rounded to bf16.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use half::bf16;
use lora_core::{DType, HostTensor, files};

use super::source::{WeightSource, check_tensor, left_over, no_fp8};
use crate::model::config::Biases;
use crate::model::{Architecture, GgufRotary, ModelConfig, ModelError, RopeConfig, RopeScaling};
use crate::text::GgufVocab;

/// Tokenizer data of a GGUF file.
pub struct GgufText {
    /// Vocabulary and merges.
    pub vocab: GgufVocab,
    /// Source of the chat template, if the file has one.
    pub chat_template: Option<String>,
}

/// An open GGUF file.
pub struct Gguf {
    path: PathBuf,
    file: BufReader<File>,
    content: Content,
    /// Names in the file by names in Hugging Face checkpoints.
    names: HashMap<String, String>,
    /// Names of the tensors that were taken, as in Hugging Face checkpoints.
    taken: HashSet<String>,
    config: ModelConfig,
}

impl Gguf {
    /// Reads the metadata.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Format`] for a broken file, [`ModelError::Unsupported`]
    /// for an architecture or setting that the engine does not run.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = files::open_regular(path).map_err(|e| ModelError::io(path, e))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file)
            .map_err(|e| ModelError::Format { path: path.to_owned(), cause: e.to_string() })?;
        let config = read_config(&Metadata { path, values: &content.metadata }, &content)?;
        let names = content.tensor_infos.keys().map(|n| (hf_name(n), n.clone())).collect();
        let taken = HashSet::new();
        let mut this = Self { path: path.to_owned(), file, content, names, taken, config };
        if let Some(divisors) = this.rope_divisors()? {
            this.config.rope.scaling = RopeScaling::PerFrequency(divisors);
        }
        Ok(this)
    }

    /// Configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Vocabulary and chat template.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the file has no vocabulary.
    pub fn text(&self) -> Result<GgufText, ModelError> {
        let meta = Metadata { path: &self.path, values: &self.content.metadata };
        let id = |key: &str| meta.get(key).and_then(|v| v.to_u32().ok());
        let vocab = GgufVocab {
            model: meta.string("tokenizer.ggml.model")?,
            pre: meta.string("tokenizer.ggml.pre").unwrap_or_else(|_| "default".to_owned()),
            tokens: meta.strings("tokenizer.ggml.tokens")?,
            token_types: meta.list("tokenizer.ggml.token_type", |v| v.to_i32().ok())?,
            merges: meta.strings("tokenizer.ggml.merges")?,
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            unk: id("tokenizer.ggml.unknown_token_id"),
            add_bos: meta.get("tokenizer.ggml.add_bos_token").and_then(|v| v.to_bool().ok()),
        };
        Ok(GgufText { vocab, chat_template: meta.string("tokenizer.chat_template").ok() })
    }

    /// Divisors of the rotary frequencies, if the file has them.
    fn rope_divisors(&mut self) -> Result<Option<Vec<f32>>, ModelError> {
        if !self.has("rope_freqs.weight") {
            return Ok(None);
        }
        Ok(Some(self.take("rope_freqs.weight", &[self.config.head_dim / 2])?.to_f32()))
    }

    fn dequantize(&mut self, name: &str) -> Result<HostTensor, candle_core::Error> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu)?;
        let tensor = tensor.dequantize(&Device::Cpu)?;
        let shape = tensor.dims().to_vec();
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        // Norms and frequency tables are vectors, stored in f32; they are not rounded.
        let bytes: Vec<u8> = if shape.len() == 1 {
            values.iter().flat_map(|v| v.to_le_bytes()).collect()
        } else {
            values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
        };
        let dtype = if shape.len() == 1 { DType::F32 } else { DType::Bf16 };
        HostTensor::new(dtype, shape, bytes)
            .ok_or_else(|| candle_core::Error::Msg(format!("{name} has another size than shape")))
    }
}

impl WeightSource for Gguf {
    fn take_fp8(&mut self, name: &str, _: &[usize]) -> Result<HostTensor, ModelError> {
        Err(no_fp8(name, "a GGUF file"))
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let tensor = self.peek(name, shape)?;
        self.taken.insert(name.to_owned());
        Ok(tensor)
    }

    fn peek(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let stored = self.names.get(name).cloned().ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        let tensor = self.dequantize(&stored).map_err(|e| ModelError::Format {
            path: self.path.clone(),
            cause: format!("tensor {stored}: {e}"),
        })?;
        check_tensor(name, &tensor, shape)?;
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => self.config.heads,
            Some("k_proj") => self.config.kv_heads,
            _ => return Ok(tensor),
        };
        // For some families llama.cpp's converter interleaves the rows of rotary pairs. Undo that.
        match self.config.architecture.traits().gguf_rotary {
            GgufRotary::Interleaved => Ok(half_split_rows(&tensor, heads)),
            GgufRotary::HalfSplit => Ok(tensor),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains_key(name) && !self.taken.contains(name)
    }

    fn finish(self: Box<Self>, config: &ModelConfig) -> Result<(), ModelError> {
        let Self { path, names, taken, .. } = *self;
        let left = names.into_keys().filter(|name| !taken.contains(name));
        left_over(&path, config, left.collect())
    }
}

/// Reorders the rows of each head from interleaved rotary pairs (0, h, 1, h + 1, ...) to half-split pairs.
fn half_split_rows(tensor: &HostTensor, heads: usize) -> HostTensor {
    let rows = tensor.shape()[0];
    let (row_bytes, head) = (tensor.bytes().len() / rows.max(1), rows / heads.max(1));
    let mut bytes = Vec::with_capacity(tensor.bytes().len());
    for row in 0..rows {
        let (start, i) = (row / head * head, row % head);
        let from = start + if i < head / 2 { 2 * i } else { 2 * (i - head / 2) + 1 };
        bytes.extend_from_slice(&tensor.bytes()[from * row_bytes..(from + 1) * row_bytes]);
    }
    HostTensor::new(tensor.dtype(), tensor.shape().to_vec(), bytes)
        .unwrap_or_else(|| tensor.clone())
}

/// The Hugging Face name of a GGUF tensor; unknown names are returned unchanged.
fn hf_name(name: &str) -> String {
    const PARTS: [(&str, &str); 11] = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let mut parts = name.splitn(4, '.');
    let (Some("blk"), Some(layer), Some(part), Some(kind)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return name.to_owned();
    };
    match PARTS.iter().find(|(gguf, _)| *gguf == part) {
        Some((_, hf)) => format!("model.layers.{layer}.{hf}.{kind}"),
        None => name.to_owned(),
    }
}

/// The metadata of a GGUF file. Errors name the file and the key.
struct Metadata<'a> {
    path: &'a Path,
    values: &'a HashMap<String, Value>,
}

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    fn missing(&self, key: &str) -> ModelError {
        let cause = format!("metadata key {key} is missing or of another type");
        ModelError::Format { path: self.path.to_owned(), cause }
    }

    fn usize(&self, key: &str) -> Result<usize, ModelError> {
        self.get(key)
            .and_then(|v| v.to_u32().ok())
            .map(|v| v as usize)
            .ok_or_else(|| self.missing(key))
    }

    fn f32(&self, key: &str) -> Result<f32, ModelError> {
        self.get(key).and_then(|v| v.to_f32().ok()).ok_or_else(|| self.missing(key))
    }

    fn string(&self, key: &str) -> Result<String, ModelError> {
        let value = self.get(key).and_then(|v| v.to_string().ok());
        value.cloned().ok_or_else(|| self.missing(key))
    }

    fn list<T>(&self, key: &str, item: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>, ModelError> {
        let values = self.get(key).and_then(|v| v.to_vec().ok());
        values.and_then(|values| values.iter().map(item).collect()).ok_or_else(|| self.missing(key))
    }

    fn strings(&self, key: &str) -> Result<Vec<String>, ModelError> {
        self.list(key, |v| v.to_string().ok().cloned())
    }
}

fn read_config(meta: &Metadata<'_>, content: &Content) -> Result<ModelConfig, ModelError> {
    let name = meta.string("general.architecture")?;
    let architecture = Architecture::from_name(&name)?;
    let key = |part: &str| format!("{name}.{part}");
    if let Ok(kind) = meta.string(&key("rope.scaling.type"))
        && kind != "none"
    {
        return Err(ModelError::unsupported(key("rope.scaling.type"), kind, "none"));
    }
    let heads = meta.usize(&key("attention.head_count"))?;
    let hidden = meta.usize(&key("embedding_length"))?;
    let layers = meta.usize(&key("block_count"))?;
    let has = |tensor: &str| content.tensor_infos.contains_key(tensor);
    let config = ModelConfig {
        architecture,
        vocab: meta.list("tokenizer.ggml.tokens", |_| Some(()))?.len(),
        hidden,
        intermediate: meta.usize(&key("feed_forward_length"))?,
        layers,
        heads,
        kv_heads: meta.usize(&key("attention.head_count_kv")).unwrap_or(heads),
        head_dim: meta.usize(&key("attention.key_length")).unwrap_or(hidden / heads.max(1)),
        rms_norm_eps: meta.f32(&key("attention.layer_norm_rms_epsilon"))?,
        rope: RopeConfig {
            theta: meta.f32(&key("rope.freq_base")).unwrap_or(10_000.0),
            scaling: RopeScaling::None,
        },
        max_positions: meta.usize(&key("context_length"))?,
        tied_embeddings: !has("output.weight"),
        biases: Biases {
            qkv: has("blk.0.attn_q.bias"),
            o: has("blk.0.attn_output.bias"),
            mlp: has("blk.0.ffn_gate.bias"),
        },
        qk_norm: has("blk.0.attn_q_norm.weight"),
        windows: vec![None; layers],
        dtype: DType::Bf16,
        eos_ids: ["eos", "eot"]
            .iter()
            .filter_map(|end| meta.usize(&format!("tokenizer.ggml.{end}_token_id")).ok())
            .map(|id| id as u32)
            .collect(),
    };
    config.check()?;
    let rotated = meta.usize(&key("rope.dimension_count")).unwrap_or(config.head_dim);
    if rotated != config.head_dim {
        let allowed = format!("the head dimension, {}", config.head_dim);
        return Err(ModelError::unsupported(key("rope.dimension_count"), rotated, allowed));
    }
    if let Ok(window) = meta.usize(&key("attention.sliding_window")) {
        let allowed = "none: use a safetensors checkpoint";
        return Err(ModelError::unsupported(key("attention.sliding_window"), window, allowed));
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped_and_unknown_ones_stay() {
        assert_eq!(hf_name("blk.7.attn_q.weight"), "model.layers.7.self_attn.q_proj.weight");
        assert_eq!(hf_name("blk.0.ffn_down.bias"), "model.layers.0.mlp.down_proj.bias");
        assert_eq!(hf_name("blk.0.ssm_a.weight"), "blk.0.ssm_a.weight");
    }

    #[test]
    fn rows_go_from_interleaved_to_half_split_order_within_a_head() {
        let rows: Vec<f32> = (0..8).map(|v| v as f32).collect();
        let t = HostTensor::from_f32(DType::F32, vec![8, 1], &rows).unwrap();
        assert_eq!(half_split_rows(&t, 2).to_f32(), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
