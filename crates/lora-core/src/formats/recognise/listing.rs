//! Lists a folder, up to a limit.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Maximum number of entries to look at; folders of training runs have some hundred.
const MAX_ENTRIES: usize = 10_000;

/// Names in a folder; only some of them if it has more entries than the limit.
pub(super) struct Listing {
    pub dir: PathBuf,
    /// Regular files; links are followed.
    pub files: BTreeSet<String>,
    /// Folders; links are followed.
    pub folders: BTreeSet<String>,
}

impl Listing {
    /// `None` if the folder cannot be read.
    pub fn of(dir: &Path) -> Option<Self> {
        let (mut files, mut folders) = (BTreeSet::new(), BTreeSet::new());
        for entry in fs::read_dir(dir).ok()?.take(MAX_ENTRIES).flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = entry.path();
            if path.is_dir() {
                folders.insert(name);
            } else if path.is_file() {
                files.insert(name);
            }
        }
        Some(Self { dir: dir.to_owned(), files, folders })
    }

    /// Whether a file of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    /// Whether the name of a file or folder is this prefix and a number.
    pub fn numbered(names: &BTreeSet<String>, prefix: &str) -> bool {
        names.iter().any(|name| number_after(name, prefix).is_some())
    }
}

/// The number of a name such as `checkpoint-500`.
pub(super) fn number_after(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}
