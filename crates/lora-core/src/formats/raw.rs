//! Tensors of a file by name, before they are interpreted.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::{AdapterError, Source};
use crate::device::{DType, HostTensor};

/// The tensors of one adapter or checkpoint.
#[derive(Debug, Default)]
pub struct RawTensors {
    /// Tensors by name.
    pub tensors: BTreeMap<String, RawTensor>,
    /// Files that they were read from.
    pub files: Vec<PathBuf>,
}

/// One tensor; its elements are read on demand.
#[derive(Clone, Debug)]
pub struct RawTensor {
    element: ElementType,
    shape: Vec<usize>,
    source: Source,
}

/// Type of a tensor's elements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ElementType {
    /// A type that this crate computes with or stores.
    Known(DType),
    /// IEEE 754 binary64, which readers of adapters round to [`DType::F32`].
    Float64,
    /// Any other type, by the file's name for it.
    Other(String),
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(dtype) => dtype.fmt(f),
            Self::Float64 => f.write_str("float64"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

impl ElementType {
    /// Bytes of an element; `None` for [`ElementType::Other`].
    pub fn size(&self) -> Option<usize> {
        match self {
            Self::Known(dtype) => Some(dtype.size()),
            Self::Float64 => Some(size_of::<f64>()),
            Self::Other(_) => None,
        }
    }
}

impl RawTensor {
    /// A dense row-major tensor; `None` if `source` does not have exactly the bytes of the shape (which
    /// is not checked for [`ElementType::Other`]).
    pub fn new(element: ElementType, shape: Vec<usize>, source: Source) -> Option<Self> {
        if let Some(size) = element.size() {
            // Strides must not overflow either, even if another extent is zero.
            let largest =
                shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent.max(1)))?;
            let bytes = largest.checked_mul(size)?;
            let bytes = if shape.contains(&0) { 0 } else { bytes };
            if bytes as u64 != source.len() {
                return None;
            }
        }
        Some(Self { element, shape, source })
    }

    /// Type of the elements.
    pub fn element(&self) -> &ElementType {
        &self.element
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, little-endian.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The tensor in memory; `None` for an element type other than [`ElementType::Known`].
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn read(&self) -> Result<Option<HostTensor>, AdapterError> {
        match self.element {
            ElementType::Known(dtype) => {
                Ok(HostTensor::new(dtype, self.shape.clone(), self.source.bytes()?))
            }
            ElementType::Float64 | ElementType::Other(_) => Ok(None),
        }
    }
}
