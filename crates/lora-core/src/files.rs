//! Reading the files of a user's folder.
//!
//! Every file whose path a user gives goes through this module. It opens regular files only, so that
//! a FIFO cannot block the caller and a device cannot feed it for ever, and it reads small files up to
//! a limit, so that nobody's memory depends on the size of a file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Most bytes of a configuration, such as `adapter_config.json` or `config.json`.
pub const MAX_CONFIG: u64 = 8 << 20;

/// Most bytes of a `tokenizer.json`; the largest vocabularies in use take about 35 MB.
pub const MAX_TOKENIZER: u64 = 512 << 20;

/// Opens a regular file, through links.
///
/// # Errors
/// That of the system; [`ErrorKind::InvalidInput`] for a folder, a FIFO, a socket or a device.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // Without this flag, opening a FIFO waits for somebody who writes to it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// Reads a regular file of up to `limit` bytes.
///
/// # Errors
/// Those of [`open_regular`]; [`ErrorKind::FileTooLarge`] with the limit for a larger file.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let size = file.metadata()?.len();
    if size > limit {
        return Err(too_large(limit, &format!("{size} bytes")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // A file may grow while it is read, and some file systems report no size.
    file.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(too_large(limit, "more")),
        false => Ok(bytes),
    }
}

/// As [`read`], for text in UTF-8.
///
/// # Errors
/// Those of [`read`]; [`ErrorKind::InvalidData`] for bytes that are no UTF-8.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read(path, limit)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        io::Error::new(ErrorKind::InvalidData, format!("it is not UTF-8 from byte {at} on"))
    })
}

fn too_large(limit: u64, found: &str) -> io::Error {
    let message = format!("it has {found}, but at most {limit} bytes are read of such a file");
    io::Error::new(ErrorKind::FileTooLarge, message)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn files_are_read_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(read(&path, 3).unwrap(), b"abc");
        let error = read(&path, 2).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        assert!(error.to_string().contains("3 bytes") && error.to_string().contains("at most 2"));
        std::fs::write(&path, [b'a', 0xff]).unwrap();
        assert!(read_text(&path, 9).unwrap_err().to_string().contains("from byte 1 on"));
    }

    #[test]
    fn what_is_no_regular_file_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let endless = dir.path().join("endless");
        std::os::unix::fs::symlink("/dev/zero", &endless).unwrap();
        for path in [&fifo, &endless, dir.path()] {
            let error = read(path, 10).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{}: {error}", path.display());
        }
        assert_eq!(read(&dir.path().join("absent"), 10).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
