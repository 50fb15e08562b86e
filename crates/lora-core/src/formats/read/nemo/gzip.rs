//! Compressed archives.

use std::io::{self, BufReader, Read};

use flate2::read::MultiGzDecoder;

use crate::formats::{AdapterError, Source, io_error};

/// Maximum ratio of decompressed to compressed size, and the decompressed size that is always allowed.
/// Weights hardly compress, so a larger ratio means a decompression bomb.
const MAX_GROWTH: u64 = 32;
const ALWAYS_ALLOWED: u64 = 64 << 20;

/// Other compressed formats, which are not read: their first bytes, and how to decompress them.
const OTHERS: [(&[u8], &str); 3] =
    [(b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")];

/// The archive itself, or its decompressed content in an unnamed temporary file, which exists until its last
/// tensor is dropped.
pub(super) fn plain(archive: &Source) -> Result<Source, AdapterError> {
    let path = archive.path();
    let failed = |error| io_error(path, error);
    let mut start = [0; 6];
    let start = &mut start[..6.min(archive.len() as usize)];
    archive.read_at(0, start).map_err(failed)?;
    let invalid = |problem: String| AdapterError::InvalidNemo { path: path.to_owned(), problem };
    if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Err(invalid(format!("it is compressed with {name}: decompress it first")));
    }
    if !start.starts_with(b"\x1f\x8b") {
        return Ok(archive.clone());
    }
    let limit = archive.len().saturating_mul(MAX_GROWTH).saturating_add(ALWAYS_ALLOWED);
    let decoder = MultiGzDecoder::new(BufReader::new(archive.reader()));
    let mut file = tempfile::tempfile().map_err(failed)?;
    // One byte more than the limit, to notice when it is exceeded.
    let written = io::copy(&mut decoder.take(limit.saturating_add(1)), &mut file);
    let written = written.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            invalid(format!("it cannot be decompressed ({error}): copy it again"))
        }
        _ => failed(error),
    })?;
    if written > limit {
        return Err(invalid(format!(
            "it has {} bytes and decompresses to more than the {limit} that are allowed for it",
            archive.len()
        )));
    }
    Ok(Source::in_file(path, file, written))
}
