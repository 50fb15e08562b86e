//! A torch checkpoint: a zip file with a pickle and one uncompressed entry for each tensor.

use std::io::{self, Seek, Write};

use zip::result::ZipError;
use zip::write::{SimpleFileOptions, ZipWriter};
use zip::{CompressionMethod, DateTime};

use super::Tensors;
use super::pickle::{Described, state_dict};

/// Alignment of tensors in the file, as in torch, so that they can be memory-mapped.
const ALIGNMENT: u16 = 64;

/// Zip entries of this size or larger need 64-bit sizes.
const LARGE: usize = u32::MAX as usize;

/// Writes the checkpoint, building one tensor at a time.
pub(super) fn write(out: impl Write + Seek, tensors: &Tensors) -> io::Result<()> {
    let described: Vec<Described<'_>> = tensors
        .iter()
        .map(|(name, tensor)| Described { name, dtype: tensor.element(), shape: tensor.extents() })
        .collect();
    let mut zip = ZipWriter::new(out);
    let mut add = |name: &str, bytes: &[u8]| -> io::Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(DateTime::default())
            .with_alignment(ALIGNMENT)
            .large_file(bytes.len() >= LARGE);
        zip.start_file(format!("archive/{name}"), options).map_err(as_io)?;
        zip.write_all(bytes)
    };
    add("data.pkl", &state_dict(&described))?;
    add("byteorder", b"little")?;
    for (storage, (_, tensor)) in tensors.iter().enumerate() {
        add(&format!("data/{storage}"), &tensor.bytes())?;
    }
    add("version", b"3\n")?;
    zip.finish().map_err(as_io)?.flush()
}

fn as_io(error: ZipError) -> io::Error {
    match error {
        ZipError::Io(error) => error,
        other => io::Error::other(other),
    }
}
