//! Linear layers and KV scales of checkpoints in FP8, and of those that are quantised on loading.

use lora_core::fp8::{self, Fp8Scales, InputScale};
use lora_core::ops::KvScales;
use lora_core::{Backend, HostTensor};

use super::ModelError;
use super::loader::WeightLoader;
use super::quantization::Fp8Weights;
use super::shard::NamedPart;

impl<B: Backend> WeightLoader<'_, B> {
    /// Reads the matrix made of `parts`, stacked by rows, in FP8 where the model has it so.
    pub(super) fn linear(
        &mut self,
        parts: &[NamedPart],
        in_dim: usize,
        bias: Option<&[f32]>,
    ) -> Result<B::Linear, ModelError> {
        let quantised = match &self.plan.quantization.weights {
            Some(weights) if in_fp8(weights, parts)? => Some(weights),
            _ => None,
        };
        let Some(weights) = quantised else {
            let read = |NamedPart { name, rows, part }: &NamedPart| {
                Ok(part.of_matrix(self.matrix(&format!("{name}.weight"), *rows, in_dim)?))
            };
            let parts = parts.iter().map(read).collect::<Result<Vec<_>, ModelError>>()?;
            return Ok(self.prepare(&parts, bias)?);
        };
        let stored = weights.stored;
        let input = match stored {
            true => self.input_scale(parts)?,
            false => InputScale::Dynamic,
        };
        let mut scales = Fp8Scales { parts: Vec::with_capacity(parts.len()), input };
        let mut codes = Vec::with_capacity(parts.len());
        for NamedPart { name, rows, part } in parts {
            // Scales are those of the whole matrix, whichever part of it is held here.
            let (whole, scale) = match stored {
                true => self.fp8_part(name, [*rows, in_dim])?,
                false => self.quantised_part(name, *rows, in_dim)?,
            };
            codes.push(part.of_matrix(whole));
            scales.parts.push(scale);
        }
        self.matrix_bytes += codes.iter().map(|part| part.bytes().len()).sum::<usize>();
        Ok(self.be.prepare_fp8_linear(&codes, &scales, bias)?)
    }

    /// Scales of a layer's keys and values: those of the checkpoint, 1 where it has none.
    pub(super) fn kv_scales(&mut self, attention: &str) -> Result<KvScales, ModelError> {
        let mut scale = |name: String| match self.source.has(&name) {
            true => self.scale(&name),
            false => Ok(1.0),
        };
        let scales = KvScales {
            k: scale(format!("{attention}.k_proj.k_scale"))?,
            v: scale(format!("{attention}.v_proj.v_scale"))?,
        };
        // They are for a cache in FP8; another one holds keys and values as they are.
        Ok(if self.plan.quantization.fp8_kv { scales } else { KvScales::ONE })
    }

    /// The largest input scale of the parts, all of which read the same input.
    fn input_scale(&mut self, parts: &[NamedPart]) -> Result<InputScale, ModelError> {
        let name = |part: &NamedPart| format!("{}.input_scale", part.name);
        if !parts.iter().any(|part| self.source.has(&name(part))) {
            return Ok(InputScale::Dynamic);
        }
        let mut largest = 0f32;
        for part in parts {
            largest = largest.max(self.scale(&name(part))?);
        }
        Ok(InputScale::Static(largest))
    }

    fn fp8_part(&mut self, name: &str, shape: [usize; 2]) -> Result<(HostTensor, f32), ModelError> {
        let codes = self.source.take_fp8(&format!("{name}.weight"), &shape)?;
        Ok((codes, self.scale(&format!("{name}.weight_scale"))?))
    }

    fn quantised_part(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<(HostTensor, f32), ModelError> {
        let name = format!("{name}.weight");
        let weight = self.matrix(&name, rows, cols)?;
        let found = weight.dtype();
        let allowed = "float32, float16 or bfloat16";
        fp8::quantise(&weight)
            .ok_or_else(|| ModelError::unsupported(format!("dtype of {name}"), found, allowed))
    }

    fn scale(&mut self, name: &str) -> Result<f32, ModelError> {
        let scale = self.source.take(name, &[])?.get_f32(0);
        if scale > 0.0 {
            Ok(scale)
        } else {
            Err(ModelError::unsupported(format!("tensor {name}"), scale, "a positive number"))
        }
    }
}

/// Whether the parts of a matrix are in FP8, all or none of them.
fn in_fp8(weights: &Fp8Weights, parts: &[NamedPart]) -> Result<bool, ModelError> {
    let excluded = |part: &&NamedPart| weights.exclude.matches(&part.name);
    match parts.iter().filter(excluded).count() {
        0 => Ok(true),
        n if n == parts.len() => Ok(false),
        _ => {
            let names: Vec<_> = parts.iter().map(|part| part.name.as_str()).collect();
            let found = format!("{:?}, which names some of {names:?}", weights.exclude.patterns());
            Err(ModelError::unsupported(
                "exclude_modules",
                found,
                "all or none of them: they are one matrix",
            ))
        }
    }
}
