//! Byte ranges that are read from their file on demand.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::{AdapterError, io_error};
use crate::files;

/// A byte range, in memory or in an open file. Slices share the memory or the file handle, so
/// replacing the file under its path does not affect them.
#[derive(Clone, Debug)]
pub struct Source {
    path: Arc<Path>,
    store: Store,
}

#[derive(Clone)]
enum Store {
    Memory(Bytes),
    File { file: Arc<File>, start: u64, len: u64 },
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(bytes) => write!(f, "{} bytes in memory", bytes.len()),
            Self::File { start, len, .. } => write!(f, "{len} bytes of a file from {start}"),
        }
    }
}

impl Source {
    /// Opens a whole file without reading it.
    ///
    /// # Errors
    /// [`AdapterError::Missing`]; [`AdapterError::Io`], also if it is not a regular file.
    pub fn open(path: &Path) -> Result<Self, AdapterError> {
        let failed = |source| io_error(path, source);
        let file = files::open_regular(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        Ok(Self::in_file(path, file, len))
    }

    /// The first `len` bytes of an open file; `path` is for messages.
    pub fn in_file(path: &Path, file: File, len: u64) -> Self {
        let store = Store::File { file: Arc::new(file), start: 0, len };
        Self { path: path.into(), store }
    }

    /// Bytes in memory; `path` is for messages.
    pub fn in_memory(path: &Path, bytes: impl Into<Bytes>) -> Self {
        Self { path: path.into(), store: Store::Memory(bytes.into()) }
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match &self.store {
            Store::Memory(bytes) => bytes.len() as u64,
            Store::File { len, .. } => *len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part of it; `None` if the range exceeds it.
    pub fn slice(&self, range: Range<u64>) -> Option<Self> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let store = match &self.store {
            Store::Memory(bytes) => {
                Store::Memory(bytes.slice(range.start as usize..range.end as usize))
            }
            Store::File { file, start, .. } => Store::File {
                file: file.clone(),
                start: start + range.start,
                len: range.end - range.start,
            },
        };
        Some(Self { path: self.path.clone(), store })
    }

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// Errors of the file system; `UnexpectedEof` beyond the end.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        match &self.store {
            Store::Memory(bytes) => {
                buffer.copy_from_slice(&bytes[offset as usize..end as usize]);
                Ok(())
            }
            Store::File { file, start, .. } => file.read_exact_at(buffer, start + offset),
        }
    }

    /// All of its bytes; no copy if they are in memory.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn bytes(&self) -> Result<Bytes, AdapterError> {
        match &self.store {
            Store::Memory(bytes) => Ok(bytes.clone()),
            Store::File { len, .. } => {
                let mut buffer = vec![0; *len as usize];
                self.read_at(0, &mut buffer).map_err(|error| io_error(&self.path, error))?;
                Ok(buffer.into())
            }
        }
    }

    /// A reader from its start.
    pub fn reader(&self) -> SourceReader {
        SourceReader { source: self.clone(), position: 0 }
    }
}

/// A cursor over a [`Source`], for the readers of tar and zip files.
#[derive(Clone, Debug)]
pub struct SourceReader {
    source: Source,
    position: u64,
}

impl Read for SourceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.source.len().saturating_sub(self.position);
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.source.read_at(self.position, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for SourceReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.source.len().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_of_a_file_is_the_slice_of_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..100).collect();
        std::fs::write(&path, &bytes).unwrap();
        for source in [Source::open(&path).unwrap(), Source::in_memory(&path, bytes.clone())] {
            let part = source.slice(10..60).unwrap().slice(5..20).unwrap();
            assert_eq!(part.bytes().unwrap(), bytes[15..30]);
            assert!(part.slice(5..16).is_none() && part.read_at(10, &mut [0; 6]).is_err());
            let mut reader = part.reader();
            reader.seek(SeekFrom::End(-3)).unwrap();
            let mut tail = Vec::new();
            reader.read_to_end(&mut tail).unwrap();
            assert_eq!(tail, [27, 28, 29]);
            assert!(reader.seek(SeekFrom::Current(-16)).is_err());
        }
        assert!(matches!(Source::open(dir.path()), Err(AdapterError::Io { .. })));
    }
}
