//! Reads lines of bounded length from a stream on a background thread.

use std::io::{self, BufRead};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use lora_core::files::{self, Line};

/// Maximum bytes of a line.
pub const MAX_LINE: u64 = 16 << 20;

/// Lines that the background thread reads ahead.
const READ_AHEAD: usize = 4;

/// UTF-8 byte order mark, which some editors put at the start of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A line that is not blank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawLine {
    /// Its number, from 1.
    pub number: u64,
    /// Its bytes without the newline; `None` if it is longer than [`MAX_LINE`].
    pub bytes: Option<Vec<u8>>,
}

/// Iterates over the lines of a stream. Blank lines and a byte order mark at the start are skipped.
struct Lines<R> {
    reader: R,
    number: u64,
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = io::Result<RawLine>;

    fn next(&mut self) -> Option<io::Result<RawLine>> {
        loop {
            match self.line().transpose()? {
                Ok(RawLine { bytes: Some(bytes), .. }) if bytes.trim_ascii().is_empty() => (),
                line => return Some(line),
            }
        }
    }
}

impl<R: BufRead> Lines<R> {
    fn line(&mut self) -> io::Result<Option<RawLine>> {
        let number = self.number + 1;
        let read = files::read_line_bounded(&mut self.reader, MAX_LINE);
        let bytes = match read.map_err(|error| without_end(error, number))? {
            None => return Ok(None),
            Some(Line::TooLong) => None,
            Some(Line::Whole(mut bytes)) => {
                if number == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
                    bytes.drain(..BYTE_ORDER_MARK.len());
                }
                Some(bytes)
            }
        };
        self.number = number;
        Ok(Some(RawLine { number, bytes }))
    }
}

/// Turns the error of an endless line into one that tells the user what to give instead.
fn without_end(error: io::Error, number: u64) -> io::Error {
    match error.kind() {
        io::ErrorKind::FileTooLarge => io::Error::new(
            io::ErrorKind::InvalidData,
            format!("line {number} has no end; give JSON objects, one a line"),
        ),
        _ => error,
    }
}

/// Lines read by a background thread.
pub struct LineReader {
    lines: Receiver<io::Result<RawLine>>,
}

/// The outcome of waiting for a line.
#[derive(Debug)]
pub enum Next {
    /// A line.
    Line(RawLine),
    /// None arrived in time.
    Nothing,
    /// The end of the stream.
    End,
    /// An error; no further lines can be read.
    Failed(io::Error),
}

impl LineReader {
    /// No lines.
    pub fn empty() -> Self {
        Self { lines: sync_channel(0).1 }
    }

    /// Starts a thread that opens a stream by `open` and reads its lines. Opening may block, as for a FIFO without a
    /// writer.
    pub fn start<R: BufRead>(open: impl FnOnce() -> io::Result<R> + Send + 'static) -> Self {
        let (sender, lines) = sync_channel(READ_AHEAD);
        // The thread is not joined, as it may block on a stream that never ends.
        thread::spawn(move || {
            let lines = open().map(|reader| Lines { reader, number: 0 });
            let (lines, failed) = match lines {
                Ok(lines) => (Some(lines), None),
                Err(error) => (None, Some(Err(error))),
            };
            for line in lines.into_iter().flatten().chain(failed) {
                let last = line.is_err();
                if sender.send(line).is_err() || last {
                    return;
                }
            }
        });
        Self { lines }
    }

    /// Waits up to `limit` for a line.
    pub fn next_within(&self, limit: Duration) -> Next {
        match self.lines.recv_timeout(limit) {
            Ok(Ok(line)) => Next::Line(line),
            Ok(Err(error)) => Next::Failed(error),
            Err(RecvTimeoutError::Timeout) => Next::Nothing,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor, Read};

    use super::*;

    fn lines(text: impl Read) -> Vec<io::Result<RawLine>> {
        Lines { reader: BufReader::new(text), number: 0 }.collect()
    }

    fn line(number: u64, bytes: &[u8]) -> RawLine {
        RawLine { number, bytes: Some(bytes.to_vec()) }
    }

    #[test]
    fn blank_lines_and_a_byte_order_mark_are_skipped_and_lines_are_counted() {
        let found: Vec<RawLine> = lines(Cursor::new(b"\xef\xbb\xbfa\n\n \r\nb\r\n\xef\xbb\xbfc"))
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(found, [line(1, b"a"), line(4, b"b\r"), line(5, b"\xef\xbb\xbfc")]);
    }

    #[test]
    fn a_line_over_the_bound_is_skipped_alone() {
        let long = io::repeat(b'x').take(MAX_LINE + 1).chain(Cursor::new(b"\nnext\n"));
        let exact = io::repeat(b'y').take(MAX_LINE);
        let found = lines(long.chain(exact));
        assert_eq!(found[0].as_ref().unwrap(), &RawLine { number: 1, bytes: None });
        assert_eq!(found[1].as_ref().unwrap(), &line(2, b"next"));
        let last = found[2].as_ref().unwrap().bytes.as_ref().unwrap();
        assert_eq!((found.len(), last.len() as u64), (3, MAX_LINE));
    }

    #[test]
    fn a_line_without_an_end_is_an_error() {
        let mut lines =
            Lines { reader: BufReader::with_capacity(1 << 20, io::repeat(0)), number: 0 };
        let error = lines.next().unwrap().unwrap_err();
        assert!(error.to_string().contains("line 1 has no end"), "{error}");
    }

    #[test]
    fn an_error_of_opening_or_reading_is_the_last_item() {
        let refused = || Err::<io::Empty, _>(io::Error::from(io::ErrorKind::PermissionDenied));
        let intake = LineReader::start(refused);
        let wait = Duration::from_secs(60);
        assert!(matches!(intake.next_within(wait), Next::Failed(_)));
        assert!(matches!(intake.next_within(wait), Next::End));
        assert!(matches!(LineReader::empty().next_within(wait), Next::End));
    }
}
