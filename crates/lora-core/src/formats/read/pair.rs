//! Checks of `lora_A` and `lora_B` that all formats share.

use std::collections::BTreeSet;

use super::view::View;
use crate::device::DType;
use crate::formats::{ElementType, RawTensor};
use crate::rules::{Code, Rejection, listed};

/// The tensor, if its elements are floats. Float64 is rounded to float32 when it is read.
pub(super) fn float_view(
    name: &str,
    raw: &RawTensor,
    problems: &mut Vec<Rejection>,
) -> Option<View> {
    let dtype = match raw.element() {
        ElementType::Known(dtype) => Some(*dtype).filter(|dtype| dtype.is_float()),
        ElementType::Float64 => Some(DType::F32),
        ElementType::Other(_) => None,
    };
    if let Some(dtype) = dtype {
        return Some(View::new(name, dtype, raw));
    }
    problems.push(Rejection::new(
        Code::TensorDtype,
        name,
        raw.element().to_string(),
        "float32, float16, bfloat16, or float64, which is rounded to float32",
        "convert the adapter to one of them",
    ));
    None
}

/// The rank of A `[rank, in]` and B `[out, rank]`; a rejection if their shapes do not fit each other or
/// are empty.
pub(super) fn rank_of(a: &View, b: &View, problems: &mut Vec<Rejection>) -> Option<usize> {
    let ([rank, _], [out, columns]) = (a.shape(), b.shape()) else {
        let wrong = [a, b].into_iter().filter(|view| view.shape().len() != 2);
        let allowed = "two dimensions: A [rank, in], B [out, rank]";
        problems.extend(wrong.map(|view| wrong_shape(view, allowed)));
        return None;
    };
    let (rank, columns) = (*rank, *columns);
    if rank != columns || a.len() == 0 || *out == 0 {
        problems.push(wrong_shape(b, &format!("[out, rank] beside A {:?}", a.shape())));
        return None;
    }
    Some(rank)
}

/// A tensor of the wrong shape for its role.
pub(super) fn wrong_shape(view: &View, allowed: &str) -> Rejection {
    Rejection::new(
        Code::TensorShape,
        view.name(),
        format!("shape {:?}", view.shape()),
        allowed,
        "export it again",
    )
}

/// One matrix without the other; `allowed` names both.
pub(super) fn incomplete(only: &View, allowed: &str) -> Rejection {
    Rejection::new(
        Code::IncompletePair,
        only.name(),
        "one half of a pair",
        allowed,
        "export it again",
    )
}

/// A pair whose rank is not the one that the configuration states in the fields `by`; `correct` says what
/// to correct.
pub(super) fn other_rank(a: &View, stated: usize, by: &str, correct: &str) -> Rejection {
    Rejection::new(
        Code::RankMismatch,
        a.name(),
        format!("rank {}", a.shape().first().unwrap_or(&0)),
        format!("rank {stated}, by {by}"),
        format!("correct {correct}"),
    )
}

/// Two tensors of one role.
pub(super) fn duplicate(name: &str, other: &str) -> Rejection {
    Rejection::new(
        Code::DuplicateTensor,
        name,
        format!("the role that `{other}` has already"),
        "one tensor for a role",
        "export the adapter again",
    )
}

/// Tensors whose names belong to several adapters.
pub(super) fn several_adapters(setting: &str, names: BTreeSet<String>) -> Rejection {
    Rejection::new(
        Code::SeveralAdapters,
        setting,
        listed(&names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>()),
        "the tensors of one adapter, all named alike",
        "save each adapter into a directory of its own",
    )
}
