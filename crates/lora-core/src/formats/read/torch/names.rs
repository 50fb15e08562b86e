//! What the pickle of a state dict names: classes of storages, and an attribute.

use crate::device::DType;
use crate::formats::ElementType;

/// The attribute of a state dict that has the versions of its modules.
pub(super) const METADATA: &str = "_metadata";

/// A class of storages in the module `torch`.
#[derive(Debug)]
pub(super) struct StorageClass {
    pub name: &'static str,
    /// Bytes of an element.
    pub size: u64,
    /// The type of the elements, if tensors of it are read.
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
    /// The class `torch.NAME`; `None` if that is no class of storages.
    pub fn named(name: &str) -> Option<&'static Self> {
        STORAGES.iter().find(|class| class.name == name)
    }
}
