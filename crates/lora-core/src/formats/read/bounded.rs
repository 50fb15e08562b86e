//! A limit on the bytes that the reader of a container may consume.

use std::io::{self, Read, Seek, SeekFrom};

/// Yields up to `left` bytes and then fails. The readers of tar and zip files hold the directory in
/// memory, so this bounds their memory, and also the time they spend on other files.
#[derive(Debug)]
pub(super) struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R> Bounded<R> {
    /// Allows `limit` bytes of `inner` to be read in total, at any positions.
    pub fn new(inner: R, limit: u64) -> Self {
        Self { inner, left: limit }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other("its directory is larger than any adapter's")),
        }
        Ok(count)
    }
}

impl<R: Seek> Seek for Bounded<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeking_back_does_not_lift_the_limit() {
        let mut reader = Bounded::new(io::Cursor::new([0; 8]), 10);
        let mut buffer = [0; 8];
        reader.read_exact(&mut buffer).unwrap();
        reader.rewind().unwrap();
        reader.read_exact(&mut buffer[..2]).unwrap();
        assert!(reader.read(&mut buffer).is_err());
    }
}
