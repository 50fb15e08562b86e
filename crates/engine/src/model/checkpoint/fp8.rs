//! Loading linear layers in FP8, stored in FP8 or quantised on loading, and the scales of an FP8 KV cache.

use lora_core::fp8::{self, Fp8Scales, InputScale};
use lora_core::ops::KvScales;
use lora_core::{Backend, HostTensor};

use super::loader::WeightLoader;
use super::quantization::Fp8Weights;
use crate::model::ModelError;
use crate::model::shard::NamedPart;

impl<B: Backend> WeightLoader<'_, B> {
    /// Loads the matrix made of `parts`, stacked by rows: in FP8 if the model is quantised and the modules are
    /// not excluded, else in 16 bits.
    pub(in crate::model) fn linear(
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
        let input = if stored { self.input_scale(parts)? } else { InputScale::Dynamic };
        let mut scales = Fp8Scales { parts: Vec::with_capacity(parts.len()), input };
        let mut codes = Vec::with_capacity(parts.len());
        for NamedPart { name, rows, part } in parts {
            // The scale is that of the whole matrix, also where this rank holds only a part of it.
            let (whole, scale) = if stored {
                self.fp8_part(name, [*rows, in_dim])?
            } else {
                self.quantised_part(name, *rows, in_dim)?
            };
            codes.push(part.of_matrix(whole));
            scales.parts.push(scale);
        }
        self.matrix_bytes += codes.iter().map(|part| part.bytes().len()).sum::<usize>();
        Ok(self.be.prepare_fp8_linear(&codes, &scales, bias)?)
    }

    /// Scales of a layer's FP8 keys and values: the checkpoint's, or 1.
    pub(in crate::model) fn kv_scales(&mut self, attention: &str) -> Result<KvScales, ModelError> {
        let mut scale =
            |name: String| if self.source.has(&name) { self.scale(&name) } else { Ok(1.0) };
        let scales = KvScales {
            k: scale(format!("{attention}.k_proj.k_scale"))?,
            v: scale(format!("{attention}.v_proj.v_scale"))?,
        };
        // The checkpoint may have scales though the cache is in 16 bits, which needs none. They are read
        // above in any case, as every tensor has to be.
        Ok(if self.plan.quantization.fp8_kv { scales } else { KvScales::ONE })
    }

    /// The static input scale: the largest of the parts' scales, as all parts read the same input. Dynamic
    /// if the checkpoint has none.
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

    /// Reads a module's FP8 weight and its scale.
    fn fp8_part(&mut self, name: &str, shape: [usize; 2]) -> Result<(HostTensor, f32), ModelError> {
        let codes = self.source.take_fp8(&format!("{name}.weight"), &shape)?;
        Ok((codes, self.scale(&format!("{name}.weight_scale"))?))
    }

    /// Reads a module's 16-bit weight and quantises it.
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

/// Whether the parts of a matrix are in FP8. Fails if only some of them are excluded.
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
