//! Tensors of an adapter that are described, but not read yet.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::view::View;
use crate::adapter::SiteWeights;
use crate::device::{DType, HostTensor};
use crate::formats::AdapterError;
use crate::modules::SiteKey;
use crate::rules::{Code, Rejection};

/// Sites whose tensors are still in their files.
pub(crate) type PlannedSites = BTreeMap<SiteKey, SiteWeights<TensorPlan>>;

/// How one tensor of an adapter is assembled from tensors of its file: parts that are concatenated along
/// the first axis. Nothing is read before [`TensorPlan::read`], so refusing an adapter needs no more than its
/// headers, and every element is read once, into its final place.
///
/// Clones denote the same tensor, which is read once for all of them.
#[derive(Clone, Debug)]
pub(crate) struct TensorPlan(Arc<PlannedParts>);

#[derive(Debug)]
struct PlannedParts {
    dtype: DType,
    shape: Vec<usize>,
    parts: Vec<PlannedPart>,
}

#[derive(Clone, Debug)]
enum PlannedPart {
    View(View),
    /// So many zeros, for an expert without weights.
    Zeros(usize),
}

impl From<View> for TensorPlan {
    fn from(view: View) -> Self {
        Self::new(view.dtype(), view.shape().to_vec(), vec![PlannedPart::View(view)])
    }
}

impl TensorPlan {
    fn new(dtype: DType, shape: Vec<usize>, parts: Vec<PlannedPart>) -> Self {
        Self(Arc::new(PlannedParts { dtype, shape, parts }))
    }

    /// Identifies the tensor: clones have the same identity, other plans that are alive another one.
    pub fn identity(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }

    /// Concatenates views along the first axis; `None` if there are none, or if their types or other extents
    /// differ.
    pub fn join(views: Vec<View>) -> Option<Self> {
        let first = views.first()?;
        let (dtype, tail) = (first.dtype(), first.shape().get(1..)?.to_vec());
        let alike = |view: &View| view.dtype() == dtype && view.shape().get(1..) == Some(&tail[..]);
        if !views.iter().all(alike) {
            return None;
        }
        let rows = views.iter().map(|view| view.shape()[0]).sum();
        let shape = [&[rows], &tail[..]].concat();
        Some(Self::new(dtype, shape, views.into_iter().map(PlannedPart::View).collect()))
    }

    /// Stacks the matrices of experts; `experts[i]` is that of expert `i`, or `None` for zeros. `None` if all
    /// are absent, or if they differ in shape or type.
    pub fn stack(experts: Vec<Option<View>>) -> Option<Self> {
        let first = experts.iter().flatten().next()?;
        let (dtype, shape) = (first.dtype(), first.shape().to_vec());
        let alike = |view: &View| view.dtype() == dtype && view.shape() == shape;
        if !experts.iter().flatten().all(alike) {
            return None;
        }
        let elements = first.len();
        let stacked = [&[experts.len()], &shape[..]].concat();
        let part =
            |expert: Option<View>| expert.map_or(PlannedPart::Zeros(elements), PlannedPart::View);
        Some(Self::new(dtype, stacked, experts.into_iter().map(part).collect()))
    }

    /// The rows of these ranges, concatenated; `None` if the tensor does not have exactly `rows` rows, or is
    /// a stack with absent experts.
    pub fn rows(&self, ranges: &[Range<usize>], rows: usize) -> Option<Self> {
        if self.0.shape.first() != Some(&rows) {
            return None;
        }
        let mut taken = Vec::new();
        for range in ranges {
            let mut first = 0;
            for part in &self.0.parts {
                let PlannedPart::View(view) = part else { return None };
                let end = first + view.shape()[0];
                let (from, to) = (range.start.max(first), range.end.min(end));
                if from < to {
                    taken.push(view.clone().narrow(0, from - first..to - first));
                }
                first = end;
            }
        }
        Self::join(taken)
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// Reads the elements and checks that they are finite.
    pub fn read(&self) -> Result<HostTensor, ReadProblem> {
        let PlannedParts { dtype, shape, parts } = &*self.0;
        let mut bytes = vec![0; self.len() * dtype.size()];
        let mut rest = &mut bytes[..];
        for part in parts {
            let (elements, view) = match part {
                PlannedPart::View(view) => (view.len(), Some(view)),
                PlannedPart::Zeros(elements) => (*elements, None),
            };
            let (place, after) = rest.split_at_mut(elements * dtype.size());
            rest = after;
            let Some(view) = view else { continue };
            view.read(place)?;
            // Checked here because the part is still in the cache.
            if !dtype.all_finite(place) {
                return Err(non_finite(view).into());
            }
        }
        HostTensor::new(*dtype, shape.clone(), bytes)
            .ok_or_else(|| unreachable!("the buffer was made for the shape"))
    }
}

/// Why a planned tensor could not be read.
#[derive(Debug)]
pub(crate) enum ReadProblem {
    /// Its file cannot be read.
    File(AdapterError),
    /// Its elements break a rule.
    Rejected(Rejection),
}

impl From<AdapterError> for ReadProblem {
    fn from(error: AdapterError) -> Self {
        Self::File(error)
    }
}

impl From<Rejection> for ReadProblem {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

fn non_finite(view: &View) -> Rejection {
    let found = if view.is_rounded() {
        "NaN, infinity, or a float64 beyond the range of float32"
    } else {
        "NaN or infinity"
    };
    Rejection::new(
        Code::NonFinite,
        view.name(),
        found,
        "finite numbers",
        "train the adapter again: its training diverged",
    )
}
