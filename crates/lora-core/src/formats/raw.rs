//! Tensors of a file by name, before anything is known about their meaning.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::{AdapterError, Source};
use crate::device::{DType, HostTensor};

/// The tensors of one adapter or checkpoint.
#[derive(Debug, Default)]
pub struct RawTensors {
    /// Names and tensors, in the order of the names.
    pub tensors: BTreeMap<String, RawTensor>,
    /// Files that they came from.
    pub files: Vec<PathBuf>,
}

/// One tensor, whose elements may still be in the file.
#[derive(Clone, Debug)]
pub struct RawTensor {
    element: ElementType,
    shape: Vec<usize>,
    source: Source,
}

/// Type of a tensor's elements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ElementType {
    /// One that this crate has.
    Known(DType),
    /// IEEE 754 binary64, which readers of adapters round to [`DType::F32`].
    Float64,
    /// Another one, by the file's own name for it.
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
    /// Bytes of an element; `None` for another type.
    pub fn size(&self) -> Option<usize> {
        match self {
            Self::Known(dtype) => Some(dtype.size()),
            Self::Float64 => Some(size_of::<f64>()),
            Self::Other(_) => None,
        }
    }
}

impl RawTensor {
    /// A dense row-major tensor; `None` unless `source` has exactly the bytes that a shape of a
    /// known type needs.
    pub fn new(element: ElementType, shape: Vec<usize>, source: Source) -> Option<Self> {
        if let Some(size) = element.size() {
            // Strides are products of extents too, also those of a tensor without elements.
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

    /// Where the elements are, little-endian.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The tensor in memory; `None` for an element type other than [`ElementType::Known`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self) -> Result<Option<HostTensor>, AdapterError> {
        match self.element {
            ElementType::Known(dtype) => {
                Ok(HostTensor::new(dtype, self.shape.clone(), self.source.bytes()?))
            }
            ElementType::Float64 | ElementType::Other(_) => Ok(None),
        }
    }
}
