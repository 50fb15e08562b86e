//! The tar file with a checkpoint and its configuration.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek};
use std::path::Path;

use tar::{Builder, Header};

use super::super::{WriteError, io_error};
use super::{Tensors, checkpoint};

/// Writes the archive under a temporary name, renames it, and removes it on failure.
pub(super) fn write(path: &Path, config: &str, tensors: &Tensors) -> Result<(), WriteError> {
    if path.symlink_metadata().is_ok() {
        return Err(WriteError::Exists { path: path.to_owned() });
    }
    let partial = path.with_added_extension("partial");
    let file = File::create_new(&partial).map_err(|error| io_error(&partial, error))?;
    let written = fill(file, &partial, config, tensors).and_then(|()| fs::rename(&partial, path));
    written.map_err(|error| {
        // The original error matters more than one of the clean-up.
        let _ = fs::remove_file(&partial);
        io_error(path, error)
    })
}

fn fill(file: File, path: &Path, config: &str, tensors: &Tensors) -> io::Result<()> {
    // A tar header states the length of its file, so the checkpoint is first written beside the archive.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut made = tempfile::tempfile_in(folder.unwrap_or(Path::new(".")))?;
    checkpoint::write(BufWriter::new(&made), tensors)?;
    let length = made.metadata()?.len();
    made.rewind()?;
    let mut tar = Builder::new(BufWriter::new(file));
    append(&mut tar, b"./model_config.yaml", config.as_bytes(), config.len() as u64)?;
    append(&mut tar, b"./model_weights.ckpt", BufReader::new(made), length)?;
    tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn append(
    tar: &mut Builder<BufWriter<File>>,
    name: &[u8],
    data: impl Read,
    length: u64,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    // `set_path` would remove the leading `./`, which NeMo expects.
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_size(length);
    header.set_mode(0o644);
    header.set_cksum();
    tar.append(&header, data)
}
