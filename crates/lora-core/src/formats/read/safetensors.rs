//! Safetensors files, single or sharded.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use bytes::Bytes;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use crate::device::DType;
use crate::files;
use crate::formats::recognise::refuse_others;
use crate::formats::{
    AdapterError, ElementType, FileKind, RawTensor, RawTensors, Source, io_error,
};

/// Maximum size of a header or index; far above what the largest expert adapters need.
const MAX_HEADER: u64 = 64 << 20;

/// Bytes at the start of a file that hold the length of its header.
const PREFIX: u64 = 8;

/// How the bytes of tensors are accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Residence {
    /// Read from the open file into memory. Later changes to the file do not matter.
    File,
    /// Memory-mapped; the file must not change while a tensor is alive. For checkpoints, whose tensors are
    /// copied to a device one by one and then dropped.
    Mapped,
}

/// Reads the tensors of a folder: `{stem}.safetensors`, or else the shards that
/// `{stem}.safetensors.index.json` names.
///
/// # Errors
/// As [`read`] and [`read_sharded`]; also if neither file is there.
pub fn read_folder(
    dir: &Path,
    stem: &str,
    residence: Residence,
) -> Result<RawTensors, AdapterError> {
    let single = dir.join(format!("{stem}.safetensors"));
    let index = dir.join(format!("{stem}.safetensors.index.json"));
    if files::is_present(&index) && !files::is_present(&single) {
        return read_sharded(&index, residence);
    }
    if !files::is_present(&single) {
        return Err(AdapterError::Missing { path: dir.to_owned(), what: single_name(stem) });
    }
    read(&single, residence)
}

fn single_name(stem: &str) -> String {
    format!("{stem}.safetensors (or {stem}.safetensors.index.json)")
}

/// Reads every tensor of one file.
///
/// # Errors
/// A file that cannot be read, is cut off, or is not in the format; each names the file.
pub fn read(path: &Path, residence: Residence) -> Result<RawTensors, AdapterError> {
    parse(&match residence {
        Residence::File => Source::open(path)?,
        Residence::Mapped => Source::in_memory(path, map_file(path)?),
    })
}

/// The tensors of a file's bytes; only its header is read.
///
/// # Errors
/// As [`read`].
pub fn parse(file: &Source) -> Result<RawTensors, AdapterError> {
    refuse_others(file, &[FileKind::Safetensors])?;
    let path = file.path();
    let failed = |error| io_error(path, error);
    let invalid =
        |problem: String| AdapterError::InvalidSafetensors { path: path.to_owned(), problem };
    let mut header = vec![0; header_length(file)? as usize];
    file.read_at(PREFIX, &mut header).map_err(failed)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;
    let data = PREFIX + header.len() as u64..file.len();
    let data = file.slice(data).ok_or_else(|| invalid("it ends in its header".to_owned()))?;
    if metadata.data_len() as u64 != data.len() {
        return Err(invalid(
            "its tensors do not end where the file ends (cut off, or with bytes appended)".into(),
        ));
    }
    let mut raw = RawTensors { files: vec![path.to_owned()], ..RawTensors::default() };
    for (name, info) in metadata.tensors() {
        let tensor = window(info, &data)
            .ok_or_else(|| invalid(format!("`{name}` does not fill its shape {:?}", info.shape)))?;
        raw.tensors.insert(name, tensor);
    }
    Ok(raw)
}

/// Reads every tensor of the shards that an index (`*.safetensors.index.json`) names.
///
/// # Errors
/// As [`read`]; also an index whose shards are missing, lie outside its directory, or hold other
/// tensors than the index says.
pub fn read_sharded(index: &Path, residence: Residence) -> Result<RawTensors, AdapterError> {
    let parsed: Index = serde_json::from_slice(&read_index(index)?)
        .map_err(|source| AdapterError::Json { path: index.to_owned(), source })?;
    let broken = |problem: String| AdapterError::InvalidIndex { path: index.to_owned(), problem };
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &parsed.weight_map {
        shards.entry(file).or_default().push(tensor);
    }
    let mut all = RawTensors::default();
    for (file, expected) in shards {
        if !is_plain_name(file) {
            return Err(broken(format!("names `{file}`, which is not a file beside it")));
        }
        let shard = read(&index.with_file_name(file), residence)?;
        if let Some(name) = expected.iter().find(|name| !shard.tensors.contains_key(**name)) {
            return Err(broken(format!("`{name}` is not in {file}")));
        }
        let stray = |name: &&String| parsed.weight_map.get(*name).is_none_or(|f| f != file);
        if let Some(name) = shard.tensors.keys().find(stray) {
            return Err(broken(format!(
                "{file} holds `{name}`, which the index does not place there"
            )));
        }
        all.tensors.extend(shard.tensors);
        all.files.extend(shard.files);
    }
    Ok(all)
}

fn read_index(path: &Path) -> Result<Vec<u8>, AdapterError> {
    files::read(path, MAX_HEADER).map_err(|source| io_error(path, source))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn is_plain_name(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<Bytes, AdapterError> {
    let file = files::open_regular(path).map_err(|source| io_error(path, source))?;
    let length = file.metadata().map_err(|source| io_error(path, source))?.len();
    if length < PREFIX {
        return Err(truncated(path, length, PREFIX));
    }
    // SAFETY: the map is only read, and `Bytes` owns it for as long as it is borrowed. That no other process
    // rewrites the file meanwhile is an obligation of the caller, stated at [`Residence::Mapped`]. Only
    // plain bytes are read, of which every value is valid.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|source| io_error(path, source))?;
    Ok(Bytes::from_owner(map))
}

/// The length of the header, which is bounded; distinguishes truncated files from other formats.
fn header_length(file: &Source) -> Result<u64, AdapterError> {
    let (path, found) = (file.path(), file.len());
    let mut prefix = [0; PREFIX as usize];
    if found < PREFIX {
        return Err(truncated(path, found, PREFIX));
    }
    file.read_at(0, &mut prefix).map_err(|error| io_error(path, error))?;
    let header = u64::from_le_bytes(prefix);
    if header > MAX_HEADER {
        return Err(AdapterError::InvalidSafetensors {
            path: path.to_owned(),
            problem: format!("its header claims {header} bytes, above the limit of {MAX_HEADER}"),
        });
    }
    let end_of_header = PREFIX + header;
    if end_of_header > found {
        return Err(truncated(path, found, end_of_header));
    }
    Ok(header)
}

fn truncated(path: &Path, found: u64, needed: u64) -> AdapterError {
    AdapterError::Truncated { path: path.to_owned(), found, needed }
}

fn window(info: &TensorInfo, data: &Source) -> Option<RawTensor> {
    let element = match info.dtype {
        Dtype::F32 => ElementType::Known(DType::F32),
        Dtype::F8_E4M3 => ElementType::Known(DType::F8E4m3),
        Dtype::F16 => ElementType::Known(DType::F16),
        Dtype::BF16 => ElementType::Known(DType::Bf16),
        Dtype::I32 => ElementType::Known(DType::I32),
        Dtype::F64 => ElementType::Float64,
        other => ElementType::Other(format!("{other:?}")),
    };
    let (start, end) = info.data_offsets;
    RawTensor::new(element, info.shape.clone(), data.slice(start as u64..end as u64)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    fn written(bytes: &[u8]) -> Result<RawTensors, AdapterError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        read(&path, Residence::File)
    }

    const HEADER: &str = r#"{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#;

    #[test]
    fn tensors_are_read_as_they_lie() {
        let data = [1.0f32.to_le_bytes(), 2.0f32.to_le_bytes()].concat();
        let raw = written(&file(HEADER, &data)).unwrap();
        assert_eq!(raw.tensors["t"].read().unwrap().unwrap().to_f32(), [1.0, 2.0]);
    }

    #[test]
    fn broken_files_are_refused() {
        assert!(matches!(written(b""), Err(AdapterError::Truncated { .. })));
        assert!(matches!(written(&[9, 0, 0, 0, 0, 0, 0, 0]), Err(AdapterError::Truncated { .. })));
        assert!(matches!(written(&[0xff; 16]), Err(AdapterError::InvalidSafetensors { .. })));
        for data in [&[0u8; 7][..], &[0u8; 9]] {
            let error = written(&file(HEADER, data)).unwrap_err();
            assert!(error.to_string().contains("x.safetensors"), "{error}");
        }
        assert!(written(&file("{", &[])).is_err());
    }

    #[test]
    fn an_index_must_agree_with_its_shards() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("adapter_model.safetensors.index.json");
        std::fs::write(dir.path().join("a.safetensors"), file(HEADER, &[0; 8])).unwrap();
        let read_map = |map: &str| {
            std::fs::write(&index, format!(r#"{{"weight_map": {map}}}"#)).unwrap();
            read_sharded(&index, Residence::Mapped)
        };
        assert_eq!(read_map(r#"{"t": "a.safetensors"}"#).unwrap().tensors.len(), 1);
        for map in [
            r#"{"t": "../a.safetensors"}"#,
            r#"{"t": "a.safetensors", "u": "a.safetensors"}"#,
            r#"{"u": "a.safetensors"}"#,
        ] {
            assert!(matches!(read_map(map), Err(AdapterError::InvalidIndex { .. })), "{map}");
        }
        assert!(matches!(read_map(r#"{"t": "b.safetensors"}"#), Err(AdapterError::Missing { .. })));
        assert!(matches!(read_map("1"), Err(AdapterError::Json { .. })));
    }
}
