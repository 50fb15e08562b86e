//! Names that occur in the pickle of a state dict: storage classes and an attribute.

use crate::device::DType;
use crate::formats::ElementType;

/// The attribute of a state dict that holds module versions.
pub(super) const METADATA: &str = "_metadata";

/// A storage class of the Python module `torch`.
#[derive(Debug)]
pub(super) struct StorageClass {
    pub name: &'static str,
    /// Bytes of an element.
    pub size: u64,
    /// Element type; `None` if tensors of it are not supported.
    pub element: Option<ElementType>,
}

static STORAGES: [StorageClass; 12] = [
    storage("FloatStorage", 4, Some(ElementType::Known(DType::F32))),
    storage("HalfStorage", 2, Some(ElementType::Known(DType::F16))),
    storage("BFloat16Storage", 2, Some(ElementType::Known(DType::Bf16))),
    storage("IntStorage", 4, Some(ElementType::Known(DType::I32))),
    storage("DoubleStorage", 8, Some(ElementType::Float64)),
    storage("LongStorage", 8, None),
    storage("ShortStorage", 2, None),
    storage("CharStorage", 1, None),
    storage("ByteStorage", 1, None),
    storage("BoolStorage", 1, None),
    storage("ComplexFloatStorage", 8, None),
    storage("ComplexDoubleStorage", 16, None),
];

const fn storage(name: &'static str, size: u64, element: Option<ElementType>) -> StorageClass {
    StorageClass { name, size, element }
}

impl StorageClass {
    /// The storage class `torch.NAME`, if it is one.
    pub fn named(name: &str) -> Option<&'static Self> {
        STORAGES.iter().find(|class| class.name == name)
    }
}
