//! Writing to a full disk. Skipped where the test may not mount one.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use super::program::{SHORT, generate, ids, run, text};

/// A file system of 64 KiB, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "loramux-test"]).arg(dir.path());
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self(dir)),
            other => {
                eprintln!("SKIPPED the full disk: no tmpfs can be mounted: {other:?}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{:?}", self.path());
    }
}

/// Requests whose answers need more space than the disk has.
fn requests() -> String {
    let echo = "x".repeat(2000);
    (0..100).map(|id| SHORT.replace("short", &format!("{id}-{echo}")) + "\n").collect()
}

#[test]
fn a_full_disk_leaves_whole_lines_and_the_old_file() {
    let Some(disk) = SmallDisk::mount() else { return };
    let out = disk.path().join("out");
    std::fs::write(&out, "old").unwrap();
    let words = ["--requests", "-", "--output", out.to_str().unwrap()];
    let output = run(&mut generate(&words), &requests());
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "old");
    let kept = stderr.split("the answers so far are in ").nth(1).unwrap();
    let kept = kept.split(": ").next().unwrap().trim();
    let whole = ids(&std::fs::read_to_string(kept).unwrap()).len();
    assert!((5..100).contains(&whole), "{whole}");
    assert!(stderr.contains(&format!("{whole} answers are written")), "{stderr}");
    assert!(stderr.contains("not answered: ") && stderr.contains("No space left"), "{stderr}");
}

#[test]
fn standard_output_on_a_full_disk_has_whole_lines() {
    let Some(disk) = SmallDisk::mount() else { return };
    let elsewhere = tempfile::tempdir().unwrap();
    let (input, out) = (elsewhere.path().join("in"), disk.path().join("out"));
    std::fs::write(&input, requests()).unwrap();
    let mut command = generate(&["--requests", input.to_str().unwrap()]);
    let output = command.stdout(File::create(&out).unwrap()).stderr(Stdio::piped());
    let output = output.spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    let whole = ids(&std::fs::read_to_string(&out).unwrap()).len();
    assert!((5..100).contains(&whole), "{whole}");
}
