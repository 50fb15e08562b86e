//! Writes torch files and NeMo archives, well-formed or malformed.

use std::io::{Cursor, Write};
use std::path::Path;

use lora_core::formats::Source;
use tar::{EntryType, Header};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A tensor of a state dict, as the pickle describes it.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    pub name: String,
    /// Storage class in `torch`.
    pub class: &'static str,
    /// Key and element count of its storage.
    pub storage: (String, u32),
    pub offset: u32,
    pub shape: Vec<u32>,
    pub strides: Vec<u32>,
}

impl TensorSpec {
    /// A row-major tensor that fills a bfloat16 storage.
    pub fn plain(name: &str, key: usize, shape: &[u32]) -> Self {
        let stride = |axis: usize| shape[axis + 1..].iter().product();
        Self {
            name: name.to_owned(),
            class: "BFloat16Storage",
            storage: (key.to_string(), shape.iter().product()),
            offset: 0,
            shape: shape.to_vec(),
            strides: (0..shape.len()).map(stride).collect(),
        }
    }

    fn reduce(&self) -> Vec<u8> {
        let storage = tuple(&[
            text("storage"),
            global("torch", self.class),
            text(&self.storage.0),
            text("cpu"),
            int(self.storage.1),
        ]);
        let ints = |numbers: &[u32]| tuple(&numbers.iter().map(|n| int(*n)).collect::<Vec<_>>());
        let args = [
            [storage, b"Q".to_vec()].concat(),
            int(self.offset),
            ints(&self.shape),
            ints(&self.strides),
            b"\x89".to_vec(),
            [global("collections", "OrderedDict"), b")R".to_vec()].concat(),
        ];
        call("torch._utils", "_rebuild_tensor_v2", &args)
    }
}

pub fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

pub fn int(number: u32) -> Vec<u8> {
    [b"J", &number.to_le_bytes()[..]].concat()
}

pub fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

pub fn call(module: &str, name: &str, args: &[Vec<u8>]) -> Vec<u8> {
    [global(module, name), tuple(args), b"R".to_vec()].concat()
}

/// A pickle program that results in a dict of these items.
pub fn dict(items: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|(k, v)| [&k[..], &v[..]].concat()).collect();
    [b"\x80\x02}(", &items[..], b"u."].concat()
}

pub fn state_dict(tensors: &[TensorSpec]) -> Vec<u8> {
    dict(&tensors.iter().map(|t| (text(&t.name), t.reduce())).collect::<Vec<_>>())
}

/// A parameter instead of a tensor.
pub fn parameter(tensor: &TensorSpec) -> Vec<u8> {
    let hooks = [global("collections", "OrderedDict"), b")R".to_vec()].concat();
    call("torch._utils", "_rebuild_parameter", &[tensor.reduce(), b"\x88".to_vec(), hooks])
}

/// A zip file of these entries.
pub fn zipped(entries: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(data).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A torch file of a pickle and of storages with keys 0, 1, …
pub fn torch_file(pickle: &[u8], storages: &[Vec<u8>]) -> Vec<u8> {
    let names: Vec<String> = (0..storages.len()).map(|key| format!("a/data/{key}")).collect();
    let mut entries = vec![("a/data.pkl", pickle), ("a/byteorder", b"little")];
    entries.extend(names.iter().map(String::as_str).zip(storages.iter().map(Vec::as_slice)));
    zipped(&entries, CompressionMethod::Stored)
}

/// A torch file of well-formed tensors with counting values, each with its own storage.
pub fn torch_tensors(tensors: &[(&str, &[u32])]) -> Vec<u8> {
    let specs = tensors.iter().enumerate();
    let specs: Vec<_> = specs.map(|(key, (n, shape))| TensorSpec::plain(n, key, shape)).collect();
    let storages: Vec<_> = specs.iter().map(|spec| bf16(spec.storage.1 as usize)).collect();
    torch_file(&state_dict(&specs), &storages)
}

/// Different bfloat16 numbers between 1 and 2.
pub fn bf16(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| [(i % 128) as u8 | 0x80, 0x3f]).collect()
}

/// One member of a tar file.
pub struct Member<'a> {
    pub name: &'a str,
    pub kind: EntryType,
    pub data: &'a [u8],
}

impl<'a> Member<'a> {
    pub fn file(name: &'a str, data: &'a [u8]) -> Self {
        Self { name, kind: EntryType::Regular, data }
    }
}

/// A tar file of these members, with names written verbatim.
pub fn tarred(members: &[Member<'_>]) -> Vec<u8> {
    tarred_with(&[], members)
}

/// A tar file of these members, with an extended header of these keywords before each.
pub fn tarred_with(keywords: &[(&str, &[u8])], members: &[Member<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for member in members {
        tar.append_pax_extensions(keywords.iter().copied()).unwrap();
        let mut header = Header::new_gnu();
        header.as_mut_bytes()[..member.name.len()].copy_from_slice(member.name.as_bytes());
        header.set_entry_type(member.kind);
        header.set_size(member.data.len() as u64);
        header.set_mode(0o644);
        if member.kind.is_symlink() || member.kind.is_hard_link() {
            header.set_link_name("model_weights.ckpt").unwrap();
        }
        if member.kind.is_gnu_sparse() {
            header.as_gnu_mut().unwrap().realsize = *b"00000000000\0";
        }
        header.set_cksum();
        tar.append(&header, member.data).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn gzipped(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A file of this name in memory.
pub fn source(name: &str, bytes: impl Into<Vec<u8>>) -> Source {
    Source::in_memory(Path::new(name), bytes.into())
}
