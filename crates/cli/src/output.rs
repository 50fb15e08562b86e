//! The destination of JSON lines: only whole lines are written, and an existing file is replaced only once the new one
//! is complete.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::{Builder, NamedTempFile};

use crate::args::{GenerateJob, Sink, Source};
use crate::exit::{Exit, Failure, OrExit};

/// A destination of lines and their count.
pub(crate) struct Output<'a> {
    to: To<'a>,
    lines: usize,
}

enum To<'a> {
    /// A pipe, a terminal or a device, from which nothing can be taken back.
    Stream(Box<dyn Write + 'a>),
    /// A regular file that is already open, such as redirected standard output.
    File(File),
    /// A temporary file beside `target`, which replaces `target` at the end.
    Beside { file: NamedTempFile, target: PathBuf },
}

/// Checks, before the model is loaded, that the file of answers can be written and is not the file of requests.
///
/// # Errors
/// [`Exit::Usage`] with the file.
pub(crate) fn check(job: &GenerateJob) -> Result<(), Failure> {
    let Sink::File(path) = &job.sink else { return Ok(()) };
    check_file(path, &job.source)
        .with_context(|| format!("cannot write {}", path.display()))
        .or_exit(Exit::Usage)
}

fn check_file(path: &Path, source: &Source) -> anyhow::Result<()> {
    let requests = match source {
        Source::File(requests) => fs::metadata(requests).ok(),
        Source::Stdin => fs::metadata("/dev/stdin").ok(),
        Source::Prompt(_) | Source::Chat(_) => None,
    };
    if let (Some(requests), Ok(answers)) = (requests, fs::metadata(path)) {
        let file = |of: &fs::Metadata| (of.dev(), of.ino());
        if answers.is_file() && file(&requests) == file(&answers) {
            bail!("it is the file of requests; give another --output");
        }
    }
    match Place::of(path)? {
        Place::Direct => Ok(()),
        Place::Beside { target, .. } => beside(&target, None).map(drop),
    }
}

/// Paths to files that are already open, such as a shell's `>(command)`.
const OPEN_FILES: [&str; 4] = ["/dev/fd", "/dev/stdout", "/dev/stderr", "/proc"];

/// How to write to a path.
enum Place {
    /// Directly, as it is no regular file.
    Direct,
    /// By a temporary file beside it: the path with links resolved, and the permissions of an existing file.
    Beside { target: PathBuf, old: Option<Permissions> },
}

impl Place {
    fn of(path: &Path) -> anyhow::Result<Self> {
        if OPEN_FILES.iter().any(|open| path.starts_with(open)) {
            return Ok(Self::Direct);
        }
        let old = match fs::metadata(path) {
            Ok(old) => old,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::Beside { target: path.to_owned(), old: None });
            }
            Err(error) => return Err(error.into()),
        };
        if old.is_dir() {
            bail!("it is a folder; give a file");
        }
        if !old.is_file() {
            return Ok(Self::Direct);
        }
        if old.permissions().readonly() {
            bail!("it is read-only");
        }
        Ok(Self::Beside { target: path.canonicalize()?, old: Some(old.permissions()) })
    }
}

/// Creates an empty temporary file in the folder of `target`, named after it.
fn beside(target: &Path, permissions: Option<Permissions>) -> anyhow::Result<NamedTempFile> {
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut name = target.file_name().context("it is no file")?.to_owned();
    name.push(".");
    // The process's umask applies.
    let permissions = permissions.unwrap_or_else(|| Permissions::from_mode(0o666));
    let file = Builder::new()
        .prefix(&name)
        .suffix(".partial")
        .permissions(permissions)
        .tempfile_in(folder);
    file.with_context(|| format!("cannot make a file in {}", folder.display()))
}

impl<'a> Output<'a> {
    /// Opens the destination of a job's answers. `stdout_file` is standard output if that is a regular file.
    ///
    /// # Errors
    /// [`Exit::Usage`] with the file.
    pub fn open(
        sink: &Sink,
        stdout: &'a mut dyn Write,
        stdout_file: Option<File>,
    ) -> Result<Self, Failure> {
        let to = match sink {
            Sink::File(path) => Self::open_file(path)
                .with_context(|| format!("cannot write {}", path.display()))
                .or_exit(Exit::Usage)?,
            Sink::Text | Sink::Stdout => match stdout_file {
                Some(file) => To::File(file),
                None => To::Stream(Box::new(stdout)),
            },
        };
        Ok(Self { to, lines: 0 })
    }

    fn open_file(path: &Path) -> anyhow::Result<To<'a>> {
        Ok(match Place::of(path)? {
            Place::Direct => {
                let file = OpenOptions::new().write(true).open(path)?;
                if file.metadata()?.is_file() { To::File(file) } else { To::Stream(Box::new(file)) }
            }
            Place::Beside { target, old } => To::Beside { file: beside(&target, old)?, target },
        })
    }

    /// Lines written so far.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Writes and flushes a line, which ends with a newline. If it cannot be written whole, a file is truncated to the
    /// lines before it.
    ///
    /// # Errors
    /// That of the system.
    pub fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        match &mut self.to {
            To::Stream(stream) => stream.write_all(line).and_then(|()| stream.flush())?,
            To::File(file) => write_whole(file, line)?,
            To::Beside { file, .. } => write_whole(file.as_file_mut(), line)?,
        }
        self.lines += 1;
        Ok(())
    }

    /// Replaces the old file by the complete new one.
    ///
    /// # Errors
    /// That of the system; the old file is then unchanged, and the message says where the new one is.
    pub fn finish(self) -> anyhow::Result<()> {
        let To::Beside { file, target } = self.to else { return Ok(()) };
        let name = || format!("cannot write {}", target.display());
        if let Err(error) = file.as_file().sync_all() {
            let kept = keep(file);
            return Err(error).with_context(|| format!("{}{kept}", name()));
        }
        match file.persist(&target) {
            Ok(_) => Ok(()),
            Err(error) => {
                let kept = keep(error.file);
                Err(error.error).with_context(|| format!("{}{kept}", name()))
            }
        }
    }

    /// Abandons an incomplete output. Keeps the temporary file if it has lines, and returns a note that says where it
    /// is; otherwise returns an empty string.
    pub fn give_up(self) -> String {
        match self.to {
            To::Beside { file, .. } if self.lines > 0 => keep(file),
            _ => String::new(),
        }
    }
}

/// Keeps a temporary file, and returns a note with its path.
fn keep(file: NamedTempFile) -> String {
    match file.keep() {
        Ok((_, path)) => format!("; the answers so far are in {}", path.display()),
        Err(error) => format!("; the answers so far are lost: {}", error.error),
    }
}

/// Appends all of `bytes` to the file, or nothing.
fn write_whole(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    let end = file.metadata()?.len();
    file.write_all(bytes).inspect_err(|_| {
        // The write error is returned; if truncating fails too, a partial line remains.
        let _ = file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end)));
    })
}
