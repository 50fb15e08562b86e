//! Rotary position settings of a `config.json`. Releases of transformers differ in where they write them:
//! `rope_scaling` beside `rope_theta`, or both in `rope_parameters`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::super::ModelError;
use super::super::rope::{RopeConfig, RopeScaling};
use super::agree::agreed;

/// `rope_scaling` or `rope_parameters`.
#[derive(Deserialize, Serialize, PartialEq, Default)]
pub(super) struct RawRope {
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_theta: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_type: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    old_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    factor: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    low_freq_factor: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    high_freq_factor: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    original_max_position_embeddings: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_rotary_factor: Option<f32>,
}

/// Prints it as JSON, as in the file.
impl fmt::Display for RawRope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

/// All fields of a `config.json` that concern rotary positions.
pub(super) struct RopeFields<'a> {
    pub rope_theta: Option<f32>,
    pub partial_rotary_factor: Option<f32>,
    pub rope_scaling: Option<&'a RawRope>,
    pub rope_parameters: Option<&'a RawRope>,
}

impl RopeFields<'_> {
    /// Combines the fields.
    ///
    /// # Errors
    /// [`ModelError::Contradiction`] or [`ModelError::Unsupported`], naming the fields.
    pub(super) fn read(&self) -> Result<RopeConfig, ModelError> {
        // As in transformers, an empty object counts as absent.
        let given = |rope: &&RawRope| **rope != RawRope::default();
        let nested = [
            ("rope_scaling", self.rope_scaling.filter(given)),
            ("rope_parameters", self.rope_parameters.filter(given)),
        ];
        let [scaling, parameters] = nested.map(|(_, rope)| rope);
        self.refuse_partial(scaling, parameters)?;
        let theta = agreed([
            ("rope_scaling.rope_theta", scaling.and_then(|rope| rope.rope_theta)),
            ("rope_parameters.rope_theta", parameters.and_then(|rope| rope.rope_theta)),
            ("rope_theta", self.rope_theta),
        ])?;
        let mut read = Vec::new();
        for (name, rope) in nested {
            let Some(rope) = rope else { continue };
            read.push((name, rope, rope.scaling()?));
        }
        if let [(first, one, scaling), (second, two, other)] = &read[..]
            && scaling != other
        {
            return Err(ModelError::Contradiction {
                fields: [*first, *second].map(str::to_owned),
                values: [one.to_string(), two.to_string()],
            });
        }
        let scaling = read.into_iter().next().map_or(RopeScaling::None, |(.., scaling)| scaling);
        let theta = theta.unwrap_or(10_000.0);
        if theta.is_finite() && theta > 0.0 {
            Ok(RopeConfig { theta, scaling })
        } else {
            Err(ModelError::unsupported("rope_theta", theta, "a finite number > 0"))
        }
    }

    fn refuse_partial(
        &self,
        scaling: Option<&RawRope>,
        parameters: Option<&RawRope>,
    ) -> Result<(), ModelError> {
        for (field, factor) in [
            ("partial_rotary_factor", self.partial_rotary_factor),
            (
                "rope_scaling.partial_rotary_factor",
                scaling.and_then(|rope| rope.partial_rotary_factor),
            ),
            (
                "rope_parameters.partial_rotary_factor",
                parameters.and_then(|rope| rope.partial_rotary_factor),
            ),
        ] {
            if let Some(factor) = factor.filter(|factor| *factor != 1.0) {
                return Err(ModelError::unsupported(field, factor, "1.0"));
            }
        }
        Ok(())
    }
}

impl RawRope {
    fn scaling(&self) -> Result<RopeScaling, ModelError> {
        let need = |field: &'static str, value: Option<f32>| {
            value.filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
                let found = value.map_or("nothing".to_owned(), |v| v.to_string());
                ModelError::unsupported(field, found, "a finite number > 0")
            })
        };
        let kind = [("rope_type", self.rope_type.as_deref()), ("type", self.old_type.as_deref())];
        match agreed(kind)?.unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: need("rope factor", self.factor)? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("rope factor", self.factor)?,
                low_freq_factor: need("rope low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("rope high_freq_factor", self.high_freq_factor)?,
                original_max_positions: need(
                    "rope original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            }),
            other => Err(ModelError::unsupported("rope_type", other, "default, linear or llama3")),
        }
    }
}
