//! Shapes of an adapter's dense tensors on a model.

use crate::adapter::{LowRank, SiteWeights};
use crate::device::HostTensor;
use crate::geometry::ModelGeometry;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection, listed};

/// Input and output features of a site.
#[derive(Clone, Copy)]
pub(super) struct SiteDims {
    pub input: usize,
    pub output: usize,
}

impl SiteDims {
    /// Those of a site on a model; `None` for a norm, and for a site that the model does not have.
    pub fn of(key: SiteKey, model: &ModelGeometry) -> Option<Self> {
        let (input, output) = match key {
            SiteKey::Embed => (model.vocab, model.hidden),
            SiteKey::Head => (model.hidden, model.vocab),
            SiteKey::Layer(_, module) => model.dims(module)?,
            SiteKey::Norm(..) | SiteKey::FinalNorm => return None,
        };
        Some(Self { input, output })
    }
}

/// Checks the tensors of a dense site, whose base layer has these dimensions.
pub(super) fn check_site(
    key: SiteKey,
    site: &SiteWeights,
    dims: SiteDims,
    problems: &mut Vec<Rejection>,
) {
    let SiteDims { input, output } = dims;
    let mut expect = |role: &str, tensor: Option<&HostTensor>, shape: &[usize]| {
        let Some(tensor) = tensor.filter(|tensor| tensor.shape() != shape) else { return };
        problems.push(misfit(role, key, tensor, shape));
    };
    if let Some(LowRank { rank, a, b, magnitude, b_bias, .. }) = &site.low_rank {
        expect("lora_A", Some(a), &[*rank, input]);
        expect("lora_B", Some(b), &[output, *rank]);
        expect("lora_magnitude_vector", magnitude.as_ref(), &[output]);
        expect("lora_B.bias", b_bias.as_ref(), &[output]);
    }
    // An embedding is stored [vocab, hidden], which is [in, out]; linear layers [out, in].
    let weight = if key == SiteKey::Embed { [input, output] } else { [output, input] };
    expect("weight", site.replacement.as_ref(), &weight);
    expect("bias", site.base_bias.as_ref(), &[output]);
    if let Some(rows) = &site.rows {
        expect("trainable_tokens_delta", Some(&rows.values), &[rows.ids.len(), weight[1]]);
        check_tokens(key, &rows.ids, weight[0], problems);
    }
}

/// Trained tokens must be in the vocabulary of the model.
fn check_tokens(key: SiteKey, ids: &[u32], vocab: usize, problems: &mut Vec<Rejection>) {
    let beyond: Vec<&u32> = ids.iter().filter(|id| **id as usize >= vocab).collect();
    if !beyond.is_empty() {
        problems.push(Rejection::new(
            Code::ShapeMismatch,
            format!("trainable_token_indices of {key}"),
            format!("tokens {}", listed(&beyond)),
            format!("tokens 0 to {} of this model", vocab.saturating_sub(1)),
            "load the adapter on the model that it was trained for",
        ));
    }
}

/// Checks the weight of a norm.
pub(super) fn check_norm(
    key: SiteKey,
    site: &SiteWeights,
    model: &ModelGeometry,
    problems: &mut Vec<Rejection>,
) {
    let Some(weight) = site.replacement.as_ref().filter(|_| key.is_norm()) else { return };
    let Some(width) = model.norm_width(key) else {
        problems.push(Rejection::new(
            Code::ModuleNotInModel,
            "modules",
            key.to_string(),
            "norms that the model has",
            "load the adapter on the model that it was trained for",
        ));
        return;
    };
    if weight.shape() != [width] {
        problems.push(misfit("weight", key, weight, &[width]));
    }
}

/// A tensor whose shape is not the one that the model asks for.
fn misfit(role: &str, key: SiteKey, tensor: &HostTensor, shape: &[usize]) -> Rejection {
    Rejection::new(
        Code::ShapeMismatch,
        format!("{role} of {key}"),
        format!("{:?}", tensor.shape()),
        format!("{shape:?} on this model"),
        "load the adapter on the model that it was trained for",
    )
}
