//! Reads files that users give.
//!
//! All files whose paths come from users are opened here. Only regular files are opened, as a FIFO could
//! block and a device could be endless. Configurations are read up to a limit, so that memory does not
//! depend on the size of a file.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Maximum size of a configuration, such as `adapter_config.json` or `config.json`.
pub const MAX_CONFIG: u64 = 8 << 20;

/// Maximum size of a `tokenizer.json`; the largest vocabularies in use take about 35 MB.
pub const MAX_TOKENIZER: u64 = 512 << 20;

/// Bytes in which the end of an overlong line is looked for.
const MAX_SKIPPED: u64 = 1 << 30;

/// Whether `path` exists, as a file of any kind, even a dangling link. An optional file is only treated as
/// absent if nothing at all has its name.
pub fn is_present(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Opens a regular file; links are followed.
///
/// # Errors
/// Errors of the system; [`ErrorKind::InvalidInput`] for a folder, a FIFO, a socket or a device.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // Without this flag, opening a FIFO would wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"))
    }
}

/// Reads a regular file of up to `limit` bytes.
///
/// # Errors
/// As [`open_regular`]; [`ErrorKind::FileTooLarge`] with the limit for a larger file.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let size = file.metadata()?.len();
    if size > limit {
        return Err(too_large(limit, &format!("{size} bytes")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // A file may grow while it is read, and some file systems report no size.
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large(limit, "more")) } else { Ok(bytes) }
}

/// As [`read`], for UTF-8 text.
///
/// # Errors
/// As [`read`]; [`ErrorKind::InvalidData`] if it is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read(path, limit)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        io::Error::new(ErrorKind::InvalidData, format!("it is not UTF-8 from byte {at} on"))
    })
}

/// As [`read`], for an optional file.
///
/// # Errors
/// As [`read`], unless nothing exists at `path`.
pub fn read_optional(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    is_present(path).then(|| read(path, limit)).transpose()
}

/// A line of a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// Its bytes, without the line break.
    Whole(Vec<u8>),
    /// It is longer than the limit, and was skipped.
    TooLong,
}

/// Reads the next line of a stream, up to `limit` bytes; `None` at the end of the stream. Never holds much
/// more than `limit` bytes, however long the line is.
///
/// # Errors
/// Errors of the stream; [`ErrorKind::FileTooLarge`] for a line of more than a gibibyte, as from an endless
/// device.
pub fn read_line_bounded(reader: &mut dyn BufRead, limit: u64) -> io::Result<Option<Line>> {
    let mut line = Vec::new();
    let read = (&mut *reader).take(limit.saturating_add(1)).read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(Some(Line::Whole(line)));
    }
    if read as u64 <= limit {
        return Ok((read > 0).then_some(Line::Whole(line)));
    }
    drop(line);
    skip_line(reader)?;
    Ok(Some(Line::TooLong))
}

/// Skips the rest of a line.
fn skip_line(reader: &mut dyn BufRead) -> io::Result<()> {
    let mut skipped = 0;
    while skipped <= MAX_SKIPPED {
        let bytes = reader.fill_buf()?;
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let count = end.map_or(bytes.len(), |end| end + 1);
        reader.consume(count);
        skipped += count as u64;
        if end.is_some() || count == 0 {
            return Ok(());
        }
    }
    let message = format!("a line has more than {MAX_SKIPPED} bytes");
    Err(io::Error::new(ErrorKind::FileTooLarge, message))
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

    #[test]
    fn only_what_is_not_there_has_been_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert_eq!(read_optional(&path, 9).unwrap(), None);
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(read_optional(&path, 9).unwrap().as_deref(), Some(&b"abc"[..]));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("absent"), &link).unwrap();
        assert_eq!(read_optional(&link, 9).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(read_optional(dir.path(), 9).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_line_over_the_limit_is_passed_over_and_the_others_are_read() {
        let mut stream = io::BufReader::with_capacity(4, &b"abc\n\nabcd\nabcdefghi\nab"[..]);
        let mut next = || read_line_bounded(&mut stream, 3).unwrap();
        let whole = |text: &str| Some(Line::Whole(text.into()));
        assert_eq!(next(), whole("abc"));
        assert_eq!(next(), whole(""));
        assert_eq!(next(), Some(Line::TooLong));
        assert_eq!(next(), Some(Line::TooLong));
        assert_eq!(next(), whole("ab"));
        assert_eq!(next(), None);
    }

    #[test]
    fn a_stream_without_an_end_is_given_up() {
        let mut endless = io::BufReader::with_capacity(1 << 20, io::repeat(b'a'));
        let error = read_line_bounded(&mut endless, 3).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
    }
}
