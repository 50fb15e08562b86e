//! Sources of weights: a folder of safetensors files, or random numbers for benchmarks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use half::bf16;
use lora_core::formats::RawTensor;
use lora_core::formats::safetensors::{self, Residence};
use lora_core::{DType, HostTensor};
use rayon::prelude::*;

use crate::model::{ModelConfig, ModelError};

/// A source of a model's weights, with the tensor names of Hugging Face's Llama checkpoints. It keeps track
/// of which tensors were taken, so that no tensor of a checkpoint is ignored silently.
pub trait WeightSource {
    /// Takes a floating-point tensor and checks its shape. A scalar (`[]`) may be stored as `[1]`.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::Shape`], [`ModelError::NonFinite`], or an
    /// error of the file.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError>;

    /// Reads a tensor of any element type, without marking it as taken.
    ///
    /// # Errors
    /// As [`WeightSource::take`].
    fn peek(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError>;

    /// Takes a matrix stored in e4m3 and checks its shape.
    ///
    /// # Errors
    /// As [`WeightSource::take`]; [`ModelError::Unsupported`] for another dtype.
    fn take_fp8(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError>;

    /// Whether a tensor is in the checkpoint and was not taken yet.
    fn has(&self, name: &str) -> bool;

    /// Ends loading: the model is complete.
    ///
    /// # Errors
    /// [`ModelError::LeftOver`] if tensors remain, as the model would then differ from the checkpoint.
    fn finish(self: Box<Self>, config: &ModelConfig) -> Result<(), ModelError>;
}

/// Tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`.
pub struct FolderSource {
    dir: PathBuf,
    tensors: BTreeMap<String, RawTensor>,
    /// Names of the tensors that were taken.
    taken: BTreeSet<String>,
}

impl FolderSource {
    /// Opens the files of a folder by memory maps, so that tensors are read when they are used.
    ///
    /// # Errors
    /// [`ModelError::Weights`] naming the file that is missing or broken.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::open_as(dir, Residence::Mapped)
    }

    /// As [`FolderSource::open`], without memory maps: for a source that is used after the model is loaded,
    /// when files may have been replaced.
    ///
    /// # Errors
    /// As [`FolderSource::open`].
    pub fn open_unmapped(dir: &Path) -> Result<Self, ModelError> {
        Self::open_as(dir, Residence::File)
    }

    fn open_as(dir: &Path, residence: Residence) -> Result<Self, ModelError> {
        let raw = safetensors::read_folder(dir, "model", residence)?;
        Ok(Self { dir: dir.to_owned(), tensors: raw.tensors, taken: BTreeSet::new() })
    }
}

impl FolderSource {
    fn read(&self, name: &str) -> Result<HostTensor, ModelError> {
        let tensor = self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor {
            path: self.dir.clone(),
            name: name.to_owned(),
        })?;
        let Some(tensor) = tensor.read()? else {
            let (found, allowed) = (tensor.element(), "float32, float16 or bfloat16");
            return Err(ModelError::unsupported(format!("dtype of {name}"), found, allowed));
        };
        Ok(tensor)
    }
}

impl WeightSource for FolderSource {
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let tensor = self.read(name)?;
        self.taken.insert(name.to_owned());
        check_tensor(name, &tensor, shape).map(|()| tensor)
    }

    fn peek(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let tensor = self.read(name)?;
        check_values(name, &tensor, shape).map(|()| tensor)
    }

    fn take_fp8(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let tensor = self.read(name)?;
        self.taken.insert(name.to_owned());
        if tensor.dtype() != DType::F8E4m3 {
            let allowed = "float8_e4m3fn: the checkpoint is in FP8, and its exclude_modules do \
                           not name this module";
            let field = format!("dtype of {name}");
            return Err(ModelError::unsupported(field, tensor.dtype(), allowed));
        }
        check_values(name, &tensor, shape).map(|()| tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name) && !self.taken.contains(name)
    }

    fn finish(self: Box<Self>, config: &ModelConfig) -> Result<(), ModelError> {
        // Checkpoints of tied models may repeat the embedding as lm_head, and old ones contain rotary
        // tables. Neither is needed.
        let left = |name: &&String| {
            let repeated = config.tied_embeddings && *name == "lm_head.weight";
            !repeated && !name.ends_with("rotary_emb.inv_freq") && !self.taken.contains(*name)
        };
        left_over(&self.dir, config, self.tensors.keys().filter(left).cloned().collect())
    }
}

/// The error of [`WeightSource::take_fp8`] for sources without FP8.
pub(in crate::model) fn no_fp8(name: &str, source: &str) -> ModelError {
    ModelError::unsupported(format!("source of {name} in FP8"), source, "a folder of safetensors")
}

/// Fails if tensors were not taken.
pub(in crate::model) fn left_over(
    path: &Path,
    config: &ModelConfig,
    names: Vec<String>,
) -> Result<(), ModelError> {
    let count = names.len();
    match names.into_iter().next() {
        None => Ok(()),
        Some(first) => Err(ModelError::LeftOver {
            path: path.to_owned(),
            architecture: config.architecture.name(),
            count,
            first,
        }),
    }
}

/// Checks shape, dtype and finiteness of a tensor of floats.
pub(in crate::model) fn check_tensor(
    name: &str,
    tensor: &HostTensor,
    shape: &[usize],
) -> Result<(), ModelError> {
    if !tensor.dtype().is_float() {
        let allowed = "float32, float16 or bfloat16";
        return Err(ModelError::unsupported(format!("dtype of {name}"), tensor.dtype(), allowed));
    }
    check_values(name, tensor, shape)
}

/// Checks shape and finiteness.
fn check_values(name: &str, tensor: &HostTensor, shape: &[usize]) -> Result<(), ModelError> {
    let scalar = shape.is_empty() && tensor.shape() == [1];
    if tensor.shape() != shape && !scalar {
        return Err(ModelError::Shape {
            name: name.to_owned(),
            found: tensor.shape().to_vec(),
            expected: shape.to_vec(),
        });
    }
    if !tensor.is_finite() {
        return Err(ModelError::NonFinite { name: name.to_owned() });
    }
    Ok(())
}

/// Random weights for benchmarks: norms are 1, biases 0, and matrices uniform with variance
/// `1 / in_features`, so that activations keep their magnitude.
///
/// To start fast, random numbers are generated once for each input width. Matrices are slices of that
/// block, at offsets that depend on their names.
#[derive(Default)]
pub struct DummySource {
    blocks: HashMap<usize, Bytes>,
}

/// Number of offsets at which matrices may begin in a block.
const OFFSETS: u64 = 4096;
/// Elements between two offsets.
const OFFSET_STEP: usize = 64;

impl DummySource {
    /// A matrix of `elements` random numbers with `cols` columns.
    fn matrix(&mut self, name: &str, elements: usize, cols: usize) -> Bytes {
        let size = size_of::<bf16>();
        let room = elements + OFFSETS as usize * OFFSET_STEP;
        let block = self.blocks.entry(cols).or_default();
        if block.len() < room * size {
            let mut values = vec![bf16::ZERO; room];
            fill_uniform(&mut values, cols as u64, (3.0 / cols as f32).sqrt());
            *block = bytes_of(values);
        }
        let seed = name.bytes().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let start = (splitmix(seed) % OFFSETS) as usize * OFFSET_STEP * size;
        block.slice(start..start + elements * size)
    }
}

impl WeightSource for DummySource {
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let elements = shape.iter().product();
        let bytes = match shape {
            [_, cols] => self.matrix(name, elements, *cols),
            _ if name.ends_with("norm.weight") => bytes_of(vec![bf16::ONE; elements]),
            _ => bytes_of(vec![bf16::ZERO; elements]),
        };
        HostTensor::new(DType::Bf16, shape.to_vec(), bytes).ok_or_else(|| ModelError::Shape {
            name: name.to_owned(),
            found: Vec::new(),
            expected: shape.to_vec(),
        })
    }

    fn peek(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        self.take(name, shape)
    }

    fn take_fp8(&mut self, name: &str, _: &[usize]) -> Result<HostTensor, ModelError> {
        Err(no_fp8(name, "random weights"))
    }

    fn has(&self, name: &str) -> bool {
        name != "lm_head.weight" && !name.ends_with("_scale")
    }

    fn finish(self: Box<Self>, _: &ModelConfig) -> Result<(), ModelError> {
        Ok(())
    }
}

/// Fills `values` with uniform numbers in `[-limit, limit)`. The result does not depend on the number of
/// threads.
fn fill_uniform(values: &mut [bf16], seed: u64, limit: f32) {
    const BLOCK: usize = 1 << 16;
    values.par_chunks_mut(BLOCK).enumerate().for_each(|(block, chunk)| {
        let mut state = splitmix(seed ^ (block as u64) << 32);
        for value in chunk {
            state = splitmix(state);
            *value = bf16::from_f32(((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * limit);
        }
    });
}

/// One step of SplitMix64 (Steele, Lea & Flood, 2014).
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn bytes_of(values: Vec<bf16>) -> Bytes {
    Bytes::from_owner(Bf16Bytes(values))
}

/// A vector of bf16 as bytes, for [`Bytes::from_owner`] without a copy.
struct Bf16Bytes(Vec<bf16>);

impl AsRef<[u8]> for Bf16Bytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dummy_weights_are_reproducible_and_differ_by_name() {
        let take = |name| DummySource::default().take(name, &[3, 70_000]).unwrap();
        assert_eq!(take("a.weight"), take("a.weight"));
        assert_ne!(take("a.weight"), take("b.weight"));
        assert!(take("a.weight").is_finite());
        let norm = DummySource::default().take("model.norm.weight", &[4]).unwrap();
        assert_eq!(norm.to_f32(), [1.0; 4]);
    }
}
