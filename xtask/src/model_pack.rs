//! `cargo xtask test-gpu --pack-model`: the demo's adapters and its model, cut into pieces that are small enough to
//! copy to the machine with the GPU.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use loramux::model_fetch::{MODEL_FILE, SHA256, fetch_model};

use crate::folder;

/// The largest piece, in bytes.
const MAX_PIECE: usize = 48 << 20;

/// Writes the adapters, the model's pieces and a script that joins them into the folder `out`.
///
/// # Errors
/// If the model cannot be downloaded, a piece is too large, or the folder cannot be written.
pub fn write(out: &Path, pieces: usize) -> Result<()> {
    let model = fetch_model()?;
    let bytes = fs::read(&model).with_context(|| model.display().to_string())?;
    split(out, pieces, &bytes, SHA256)?;
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/adapters");
    folder::copy(&adapters, &out.join("adapters"))?;
    let join = out.join("join");
    println!(
        "copy {pieces} pieces, run {} there, and set LORAMUX_DEMO_MODEL to its folder",
        join.display()
    );
    Ok(())
}

fn split(folder: &Path, pieces: usize, bytes: &[u8], hash: &str) -> Result<()> {
    let size = bytes.len().div_ceil(pieces.max(1)).max(1);
    let least = bytes.len().div_ceil(MAX_PIECE);
    ensure!(size <= MAX_PIECE, "--parts is {pieces}; allowed: {least} to 99, for pieces of 48 MiB");
    ensure!(pieces <= 99, "--parts is {pieces}; allowed: {least} to 99");
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (i, piece) in bytes.chunks(size).enumerate() {
        fs::write(folder.join(format!("{MODEL_FILE}.part-{:02}", i + 1)), piece)?;
    }
    let join = folder.join("join");
    fs::write(&join, joiner(hash))?;
    fs::set_permissions(&join, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The script that joins the pieces beside it.
fn joiner(hash: &str) -> String {
    format!(
        r#"#!/usr/bin/env bash
# Joins the pieces of the model in this folder and checks the SHA-256 of the result.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
cat {MODEL_FILE}.part-* > joined
echo "{hash}  joined" | sha256sum --check --quiet
mv joined {MODEL_FILE}
"#
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// SHA-256 of `abc`, from FIPS 180-4's example.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn pieces_are_joined_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        split(dir.path(), 2, b"abc", ABC).unwrap();
        let join = || Command::new(dir.path().join("join")).output().unwrap().status.success();
        assert!(join());
        let model = dir.path().join(MODEL_FILE);
        assert_eq!(fs::read(&model).unwrap(), b"abc");
        fs::remove_file(&model).unwrap();
        fs::remove_file(dir.path().join(format!("{MODEL_FILE}.part-02"))).unwrap();
        assert!(!join(), "a piece is missing");
        assert!(!model.exists());
    }

    #[test]
    fn too_large_pieces_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = split(dir.path(), 1, &vec![0; MAX_PIECE + 1], ABC).unwrap_err().to_string();
        assert!(error.contains("--parts is 1") && error.contains("2 to 99"), "{error}");
    }
}
