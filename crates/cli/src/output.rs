//! Where the lines of answers go: whole lines only, and an old file is kept until the new one is
//! complete.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::{Builder, NamedTempFile};

use crate::args::{GenerateJob, Sink, Source};
use crate::exit::{Exit, Failure, OrExit};

/// A destination of lines.
pub(crate) struct Output<'a> {
    to: To<'a>,
    lines: usize,
}

enum To<'a> {
    /// What is written is out of reach: a pipe, a terminal, a device.
    Stream(Box<dyn Write + 'a>),
    /// A regular file that is open already, such as standard output.
    File(File),
    /// A file in the folder of `target`, which takes the place of `target` in the end.
    Beside { file: NamedTempFile, target: PathBuf },
}

/// Refuses a file of answers that cannot be written, or is the file of requests, before any work is
/// done.
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
        Place::Straight => Ok(()),
        Place::Beside { target, .. } => beside(&target, None).map(drop),
    }
}

/// Links to files that are open, such as those that a shell makes for `>(command)`.
const OPEN_FILES: [&str; 4] = ["/dev/fd", "/dev/stdout", "/dev/stderr", "/proc"];

/// How a path can be written.
enum Place {
    /// It is no regular file.
    Straight,
    /// The file, links resolved, and the permissions that it has if it is there.
    Beside { target: PathBuf, old: Option<Permissions> },
}

impl Place {
    fn of(path: &Path) -> anyhow::Result<Self> {
        if OPEN_FILES.iter().any(|open| path.starts_with(open)) {
            return Ok(Self::Straight);
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
            return Ok(Self::Straight);
        }
        if old.permissions().readonly() {
            bail!("it is read-only");
        }
        Ok(Self::Beside { target: path.canonicalize()?, old: Some(old.permissions()) })
    }
}

/// An empty file in the folder of `target`, named after it.
fn beside(target: &Path, permissions: Option<Permissions>) -> anyhow::Result<NamedTempFile> {
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut name = target.file_name().context("it is no file")?.to_owned();
    name.push(".");
    // The process's mask applies.
    let permissions = permissions.unwrap_or_else(|| Permissions::from_mode(0o666));
    let file = Builder::new()
        .prefix(&name)
        .suffix(".partial")
        .permissions(permissions)
        .tempfile_in(folder);
    file.with_context(|| format!("cannot make a file in {}", folder.display()))
}

impl<'a> Output<'a> {
    /// Opens the destination of a job's answers; `stdout_file` is standard output where that is a regular
    /// file.
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
            Place::Straight => {
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

    /// Writes a line, which ends with a newline, so that a reader sees it at once. Of one that cannot
    /// be written whole, nothing stays in a file.
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

    /// Puts a new file in the place of the old one, once it is complete.
    ///
    /// # Errors
    /// That of the system; the old file is then as it was, and the new one where the message says.
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

    /// Says where the lines of an output are that will not be complete; keeps their file, if they are
    /// in one and there are any.
    pub fn give_up(self) -> String {
        match self.to {
            To::Beside { file, .. } if self.lines > 0 => keep(file),
            _ => String::new(),
        }
    }
}

/// Keeps a file that was to be renamed, and says which.
fn keep(file: NamedTempFile) -> String {
    match file.keep() {
        Ok((_, path)) => format!("; the answers so far are in {}", path.display()),
        Err(error) => format!("; the answers so far are lost: {}", error.error),
    }
}

/// Writes all of `bytes` behind what the file holds, or nothing.
fn write_whole(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    let end = file.metadata()?.len();
    file.write_all(bytes).inspect_err(|_| {
        // What failed is told; that the rest of the line stays is the worst that comes of this.
        let _ = file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end)));
    })
}
