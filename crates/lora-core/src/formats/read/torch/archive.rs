//! The zip container of a torch file.

use std::io::BufReader;

use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use super::invalid;
use crate::formats::read::bounded::Bounded;
use crate::formats::{AdapterError, Source, SourceReader, io_error};

/// Maximum size of a pickle. The largest adapters take a few hundred bytes for each tensor.
const MAX_PICKLE: u64 = 64 << 20;

/// Maximum size of the directory and headers.
const MAX_DIRECTORY: u64 = 64 << 20;

/// Maximum number of entries; each storage is one.
const MAX_ENTRIES: usize = 1 << 18;

/// Buffer size. Headers are small and far apart, and a larger buffer would read the tensors between them.
const BUFFER: usize = 256;

/// A torch file, whose entries are byte ranges of it.
pub(super) struct Archive {
    zip: ZipArchive<BufReader<Bounded<SourceReader>>>,
    file: Source,
    folder: String,
}

impl Archive {
    /// Reads the directory.
    pub fn open(file: &Source) -> Result<Self, AdapterError> {
        recognise(file)?;
        let reader = BufReader::with_capacity(BUFFER, Bounded::new(file.reader(), MAX_DIRECTORY));
        let zip =
            ZipArchive::with_config(Config { archive_offset: ArchiveOffset::Known(0) }, reader)
                .map_err(|error| {
                    invalid(
                        file,
                        format!("its zip directory cannot be read ({error}): it may be cut off"),
                    )
                })?;
        if zip.has_duplicate_names() {
            return Err(invalid(file, "it has two entries of one name"));
        }
        if zip.len() > MAX_ENTRIES {
            let problem = format!("it has {} entries, above the limit of {MAX_ENTRIES}", zip.len());
            return Err(invalid(file, problem));
        }
        let folder = folder(&zip, file)?;
        let mut archive = Self { zip, file: file.clone(), folder };
        archive.check_kind()?;
        Ok(archive)
    }

    /// The whole file.
    pub fn file(&self) -> &Source {
        &self.file
    }

    /// The pickle, whose size is bounded.
    pub fn pickle(&mut self) -> Result<Source, AdapterError> {
        let pickle = self.entry("data.pkl")?;
        let pickle = pickle.ok_or_else(|| invalid(&self.file, "it has no entry data.pkl"))?;
        if pickle.len() > MAX_PICKLE {
            let found = pickle.len();
            let problem = format!("its pickle has {found} bytes, above the limit of {MAX_PICKLE}");
            return Err(invalid(&self.file, problem));
        }
        Ok(pickle)
    }

    /// The entry of this name in the archive's folder, which must be stored uncompressed; `None` if it does
    /// not exist.
    pub fn entry(&mut self, name: &str) -> Result<Option<Source>, AdapterError> {
        let path = format!("{}/{name}", self.folder);
        let Some(index) = self.zip.index_for_name(&path) else { return Ok(None) };
        let entry = self.zip.by_index_raw(index).map_err(|error| {
            invalid(&self.file, format!("its entry {path} cannot be read ({error})"))
        })?;
        let plain = !entry.encrypted()
            && entry.compression() == CompressionMethod::Stored
            && entry.size() == entry.compressed_size();
        if !plain {
            let problem = format!(
                "its entry {path} is compressed or encrypted ({}), which torch never does",
                entry.compression()
            );
            return Err(invalid(&self.file, problem));
        }
        let range =
            entry.data_start().and_then(|start| Some(start..start.checked_add(entry.size())?));
        let slice = range.and_then(|range| self.file.slice(range));
        let cut = || invalid(&self.file, format!("it ends before its entry {path} does"));
        slice.map(Some).ok_or_else(cut)
    }

    /// Refuses TorchScript programs, which are zip files, too, and big-endian files.
    fn check_kind(&mut self) -> Result<(), AdapterError> {
        if self.entry("constants.pkl")?.is_some() {
            return Err(invalid(&self.file, "it is a TorchScript program"));
        }
        let Some(order) = self.entry("byteorder")? else { return Ok(()) };
        let expected = b"little";
        if order.len() != expected.len() as u64 || order.bytes()? != expected[..] {
            return Err(invalid(&self.file, "its numbers are not little-endian"));
        }
        Ok(())
    }
}

/// Checks that a file begins like a zip file; torch wrote another format before release 1.6.
fn recognise(file: &Source) -> Result<(), AdapterError> {
    const ZIP: &[u8] = b"PK\x03\x04";
    // The old format begins with a pickle of the number 0x1950a86a20f9469cfc6c.
    const BEFORE_1_6: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
    let mut start = [0; BEFORE_1_6.len()];
    let start = &mut start[..BEFORE_1_6.len().min(file.len() as usize)];
    file.read_at(0, start).map_err(|error| io_error(file.path(), error))?;
    if start.starts_with(ZIP) {
        return Ok(());
    }
    Err(invalid(
        file,
        if start == BEFORE_1_6 {
            "it is in torch's format before release 1.6: load it with torch and save it again"
        } else {
            "it is not a zip file, which torch writes since release 1.6"
        },
    ))
}

/// The only folder of a torch file, which has the name of the file.
fn folder<R>(zip: &ZipArchive<R>, file: &Source) -> Result<String, AdapterError>
where
    R: std::io::Read + std::io::Seek,
{
    let pickles = zip.file_names().filter_map(|name| {
        let folder = name.ok()?.strip_suffix("/data.pkl")?.to_owned();
        (!folder.contains('/')).then_some(folder)
    });
    let pickles: Vec<String> = pickles.collect();
    match &pickles[..] {
        [folder] => Ok(folder.clone()),
        found => Err(invalid(file, format!("it has {} entries */data.pkl, not one", found.len()))),
    }
}
