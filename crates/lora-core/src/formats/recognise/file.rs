//! Recognises files by their first bytes.

use std::io::Read;
use std::path::Path;

use crate::files;
use crate::formats::{AdapterError, Found, Source, io_error};

/// Number of bytes to look at: enough for the GGUF metadata that mark an adapter.
const START: usize = 4096;

/// A kind of file that users pass in place of an adapter or its weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum FileKind {
    /// A git-lfs pointer, whose file was not fetched.
    GitLfsPointer,
    /// A LoRA adapter of llama.cpp.
    GgufAdapter,
    /// Another GGUF file.
    Gguf,
    /// HTML, usually from a download that failed or needs a login.
    WebPage,
    /// Safetensors.
    Safetensors,
    /// A zip file: torch's, or an archive.
    Zip,
    /// A bare pickle, as torch wrote before release 1.6.
    Pickle,
    /// A tar file, or a compressed file.
    Archive,
}

impl FileKind {
    /// The kind of a regular file; `None` if it is unknown or cannot be read.
    pub fn of_file(path: &Path) -> Option<Self> {
        let mut start = Vec::with_capacity(START);
        let file = files::open_regular(path).ok()?;
        file.take(START as u64).read_to_end(&mut start).ok()?;
        Self::of_start(&start)
    }

    /// The kind of a file with these first bytes.
    fn of_start(start: &[u8]) -> Option<Self> {
        let has = |part: &[u8]| start.windows(part.len()).any(|window| window == part);
        let text = start.trim_ascii_start();
        let begins = |tag: &str| {
            text.get(..tag.len()).is_some_and(|word| word.eq_ignore_ascii_case(tag.as_bytes()))
        };
        match start {
            // The length of the header, below 4 GiB, and its first byte. Tested first, as the length
            // may have the bytes of any of the magic numbers below.
            [_, _, _, _, 0, 0, 0, 0, b'{', ..] => Some(Self::Safetensors),
            [b'G', b'G', b'U', b'F', ..] if has(b"adapter.type") => Some(Self::GgufAdapter),
            [b'G', b'G', b'U', b'F', ..] => Some(Self::Gguf),
            [b'P', b'K', 3, 4, ..] => Some(Self::Zip),
            [0x1f, 0x8b, ..] => Some(Self::Archive),
            [0x80, 2..=5, ..] => Some(Self::Pickle),
            _ if begins("version https://git-lfs") => Some(Self::GitLfsPointer),
            _ if begins("<!doctype html") || begins("<html") => Some(Self::WebPage),
            _ if start.get(257..262) == Some(b"ustar") => Some(Self::Archive),
            _ => None,
        }
    }

    pub(super) const fn what(self) -> &'static str {
        match self {
            Self::GitLfsPointer => "is a git-lfs pointer, not the file that it stands for",
            Self::GgufAdapter => {
                "is a LoRA adapter in GGUF format (llama.cpp), which is not supported"
            }
            Self::Gguf => "is a GGUF file, not an adapter that can be read",
            Self::WebPage => "is a web page (HTML), not the file that should be here",
            Self::Safetensors => "is a safetensors file",
            Self::Zip => "is a zip file",
            Self::Pickle => "is a pickle",
            Self::Archive => "is an archive",
        }
    }

    pub(super) const fn remedy(self) -> &'static str {
        match self {
            Self::GitLfsPointer => {
                "fetch the file with `git lfs pull`, or download it from its repository"
            }
            Self::GgufAdapter => "give the PEFT adapter that it was converted from",
            Self::Gguf => "a GGUF model is given as the model, an adapter as PEFT saves it",
            Self::WebPage => "download it again; its repository may ask for a login",
            Self::Safetensors | Self::Pickle => {
                "give the folder that has it as adapter_model, with adapter_config.json"
            }
            Self::Zip => {
                "unpack an archive and give the folder; of a torch file, give the folder that has \
                 it as adapter_model.bin, with adapter_config.json"
            }
            Self::Archive => "unpack it and give the folder; NeMo's archives are named *.nemo",
        }
    }
}

/// Fails if a weight file is recognisably of another kind than those in `expected`.
pub(in crate::formats) fn refuse_others(
    file: &Source,
    expected: &[FileKind],
) -> Result<(), AdapterError> {
    let path = file.path();
    let mut start = vec![0; START.min(usize::try_from(file.len()).unwrap_or(START))];
    file.read_at(0, &mut start).map_err(|error| io_error(path, error))?;
    match FileKind::of_start(&start).filter(|kind| !expected.contains(kind)) {
        Some(kind) => {
            Err(AdapterError::NotAnAdapter { path: path.to_owned(), found: Found::File(kind) })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_show_in_the_first_bytes() {
        let tar = [vec![b'a'; 257], b"ustar\0".to_vec()].concat();
        let cases: [(&[u8], Option<FileKind>); 16] = [
            (b"version https://git-lfs.github.com/spec/v1\noid", Some(FileKind::GitLfsPointer)),
            (b"GGUF\x03\0\0\0...adapter.type...lora", Some(FileKind::GgufAdapter)),
            (b"GGUF\x03\0\0\0", Some(FileKind::Gguf)),
            (b"\n <!DOCTYPE HTML>", Some(FileKind::WebPage)),
            (b"<html lang=\"en\">", Some(FileKind::WebPage)),
            (b"\x10\0\0\0\0\0\0\0{\"a\"", Some(FileKind::Safetensors)),
            (b"\x1f\x8b\0\0\0\0\0\0{\"a\"", Some(FileKind::Safetensors)),
            (b"\x80\x02\0\0\0\0\0\0{\"a\"", Some(FileKind::Safetensors)),
            (b"PK\x03\x04", Some(FileKind::Zip)),
            (b"\x80\x02}q\0.", Some(FileKind::Pickle)),
            (b"\x1f\x8b\x08", Some(FileKind::Archive)),
            (&tar, Some(FileKind::Archive)),
            (b"", None),
            (b"G", None),
            (b"{\"r\": 8}", None),
            (b"version 2", None),
        ];
        for (start, kind) in cases {
            assert_eq!(FileKind::of_start(start), kind, "{start:?}");
        }
    }

    #[test]
    fn what_is_no_regular_file_has_no_kind() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(FileKind::of_file(dir.path()), None);
        assert_eq!(FileKind::of_file(&dir.path().join("absent")), None);
        let endless = dir.path().join("endless");
        std::os::unix::fs::symlink("/dev/zero", &endless).unwrap();
        assert_eq!(FileKind::of_file(&endless), None);
    }
}
