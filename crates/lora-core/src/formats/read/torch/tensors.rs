//! Converts unpickled values to tensors.

use std::collections::{BTreeMap, HashMap};

use candle_core::pickle::Object;

use super::archive::Archive;
use super::invalid;
use super::names::{METADATA, StorageClass};
use crate::formats::{AdapterError, ElementType, RawTensor, Source};

/// Maximum number of dimensions of a tensor; routed experts have three.
const MAX_DIMENSIONS: usize = 8;

/// Total size of all tensors, as a multiple of the file's size: tensors may share a storage, which would
/// otherwise let a small file describe any amount of memory.
const MAX_SHARING: u64 = 16;

/// The tensors of a state dict, by name.
pub(super) fn collect(
    state: &Object,
    archive: &mut Archive,
) -> Result<BTreeMap<String, RawTensor>, AdapterError> {
    let Object::Dict(items) = state else {
        let problem = format!("it holds {}, not a dict of tensors", kind(state));
        return Err(invalid(archive.file(), problem));
    };
    let mut storages = Storages { archive, known: HashMap::new() };
    let mut tensors = BTreeMap::new();
    let mut left = MAX_SHARING.saturating_mul(storages.archive.file().len());
    for (key, value) in items {
        let Object::Unicode(name) = key else {
            let problem = format!("one of its keys is {}, not a name", kind(key));
            return Err(invalid(storages.archive.file(), problem));
        };
        if name == METADATA && holds_plain_values(value) {
            continue;
        }
        let tensor = storages
            .tensor(value)?
            .map_err(|problem| invalid(storages.archive.file(), format!("`{name}` {problem}")))?;
        let file = storages.archive.file();
        left = left.checked_sub(tensor.source().len()).ok_or_else(|| {
            invalid(file, format!("its tensors together are {MAX_SHARING} times as large as it is"))
        })?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(invalid(file, format!("it has two values for `{name}`")));
        }
    }
    Ok(tensors)
}

/// The storages of an archive; the header of each is read once.
struct Storages<'a> {
    archive: &'a mut Archive,
    known: HashMap<String, Source>,
}

impl Storages<'_> {
    /// A tensor. The inner error completes a sentence that begins with the tensor's name.
    fn tensor(&mut self, value: &Object) -> Result<Result<RawTensor, String>, AdapterError> {
        let layout = match Layout::of(value) {
            Ok(layout) => layout,
            Err(problem) => return Ok(Err(problem)),
        };
        let source = match self.known.get(layout.storage) {
            Some(source) => source.clone(),
            None => {
                let Some(source) = self.archive.entry(&format!("data/{}", layout.storage))? else {
                    let problem = format!("has no storage: no entry data/{}", layout.storage);
                    return Ok(Err(problem));
                };
                self.known.insert(layout.storage.to_owned(), source.clone());
                source
            }
        };
        Ok(layout.cut(&source))
    }
}

/// Position and shape of a tensor in its storage.
struct Layout<'a> {
    storage: &'a str,
    element: &'static StorageClass,
    /// Number of elements of the storage.
    count: u64,
    /// Index of the first element.
    start: u64,
    shape: Vec<usize>,
}

impl<'a> Layout<'a> {
    /// Parses a call of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad,
    /// backward_hooks)`, possibly inside `_rebuild_parameter(tensor, requires_grad, backward_hooks)`.
    fn of(value: &'a Object) -> Result<Self, String> {
        let not_a_tensor =
            || format!("is {}, not a tensor: save the state dict alone", kind(value));
        let (mut builder, mut args) = call(value).ok_or_else(not_a_tensor)?;
        if builder == "_rebuild_parameter" {
            let [data, Object::Bool(_), hooks] = args else { return Err(not_a_tensor()) };
            check_hooks(hooks)?;
            (builder, args) = call(data).ok_or_else(not_a_tensor)?;
        }
        if builder != "_rebuild_tensor_v2" {
            return Err(not_a_tensor());
        }
        let [storage, offset, Object::Tuple(size), Object::Tuple(stride), Object::Bool(_), hooks] =
            args
        else {
            return Err("is a tensor with unsupported arguments".to_owned());
        };
        check_hooks(hooks)?;
        let (storage, element, count) =
            read_storage(storage).ok_or("has a storage of an unsupported kind")?;
        let shape = extents(size).ok_or("has an unsupported shape")?;
        check_row_major(&shape, stride)?;
        let start = count_of(offset).ok_or("has a storage offset that is not a number")?;
        Ok(Self { storage, element, count, start, shape })
    }

    /// The tensor, as a byte range of its storage.
    fn cut(self, storage: &Source) -> Result<RawTensor, String> {
        let Self { storage: name, element, count, start, shape } = self;
        let StorageClass { name: class, size, element: known } = element;
        let needed = count.checked_mul(*size);
        if needed != Some(storage.len()) {
            return Err(format!(
                "has a storage of {count} elements of {class}, and entry data/{name} has {} bytes",
                storage.len()
            ));
        }
        let elements = shape.iter().try_fold(1u64, |n, extent| n.checked_mul(*extent as u64));
        let range = elements.and_then(|elements| {
            let end = start.checked_add(elements)?;
            Some(start.checked_mul(*size)?..end.checked_mul(*size)?)
        });
        let element = known.clone().unwrap_or_else(|| ElementType::Other(format!("torch.{class}")));
        range
            .and_then(|range| storage.slice(range))
            .and_then(|source| RawTensor::new(element, shape.clone(), source))
            .ok_or_else(|| {
                format!(
                    "of shape {shape:?} from element {start} does not lie in its storage of {count}"
                )
            })
    }
}

/// Name and arguments of a call to a function in `torch._utils`.
fn call(value: &Object) -> Option<(&str, &[Object])> {
    let Object::Reduce { callable, args } = value else { return None };
    match (&**callable, &**args) {
        (Object::Class { module_name, class_name }, Object::Tuple(args))
            if module_name == "torch._utils" =>
        {
            Some((class_name, args))
        }
        _ => None,
    }
}

/// Parses `("storage", torch.FloatStorage, key, location, count)` to key, class and count.
fn read_storage(value: &Object) -> Option<(&str, &'static StorageClass, u64)> {
    let Object::PersistentLoad(id) = value else { return None };
    let Object::Tuple(id) = &**id else { return None };
    let [Object::Unicode(tag), Object::Class { module_name, class_name }, key, place, count] =
        &id[..]
    else {
        return None;
    };
    let (Object::Unicode(key), Object::Unicode(_)) = (key, place) else { return None };
    let element = StorageClass::named(class_name)?;
    let known = tag == "storage" && module_name == "torch";
    known.then_some((key.as_str(), element, count_of(count)?))
}

fn check_hooks(hooks: &Object) -> Result<(), String> {
    match hooks {
        Object::Dict(items) if items.is_empty() => Ok(()),
        Object::None => Ok(()),
        _ => Err("has backward hooks".to_owned()),
    }
}

fn extents(size: &[Object]) -> Option<Vec<usize>> {
    if size.len() > MAX_DIMENSIONS {
        return None;
    }
    size.iter().map(|extent| count_of(extent).and_then(|n| usize::try_from(n).ok())).collect()
}

/// Checks that a tensor is contiguous in row-major order. The stride of an axis of extent 1 is arbitrary.
fn check_row_major(shape: &[usize], strides: &[Object]) -> Result<(), String> {
    let strides: Option<Vec<u64>> = strides.iter().map(count_of).collect();
    let strides = strides.filter(|strides| strides.len() == shape.len());
    let strides = strides.ok_or("has invalid strides")?;
    if shape.contains(&0) {
        return Ok(());
    }
    let mut expected = 1u64;
    for (extent, stride) in shape.iter().zip(&strides).rev() {
        if *extent != 1 && *stride != expected {
            return Err(format!(
                "of shape {shape:?} has the strides {strides:?}: save it after .contiguous()"
            ));
        }
        expected = expected.saturating_mul(*extent as u64);
    }
    Ok(())
}

fn count_of(value: &Object) -> Option<u64> {
    match value {
        Object::Int(number) => u64::try_from(*number).ok(),
        Object::Long(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

/// Whether a value contains no tensor. (Its depth is bounded, so recursion is safe.)
fn holds_plain_values(value: &Object) -> bool {
    match value {
        Object::Dict(items) => {
            items.iter().all(|(key, value)| holds_plain_values(key) && holds_plain_values(value))
        }
        Object::Tuple(items) | Object::List(items) => items.iter().all(holds_plain_values),
        Object::Int(_) | Object::Long(_) | Object::Float(_) => true,
        Object::Unicode(_) | Object::Bool(_) | Object::None => true,
        _ => false,
    }
}

/// The kind of a value, for a message.
fn kind(value: &Object) -> &'static str {
    match value {
        Object::Class { .. } => "a class",
        Object::Int(_) | Object::Long(_) => "a whole number",
        Object::Float(_) => "a number",
        Object::Unicode(_) => "a text",
        Object::Bool(_) => "true or false",
        Object::None => "nothing (None)",
        Object::Tuple(_) => "a tuple",
        Object::List(_) => "a list",
        Object::Dict(_) => "a dict",
        Object::Reduce { .. } | Object::Build { .. } => "a built object",
        Object::PersistentLoad(_) => "a bare storage",
        Object::Mark => "a mark",
    }
}
