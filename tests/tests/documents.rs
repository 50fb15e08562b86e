//! Documents: all links are valid, and all commands are accepted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The pages of the repository, at its root and in `docs`.
fn pages() -> Vec<PathBuf> {
    let markdown = |dir: PathBuf| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|end| end == "md")).collect::<Vec<_>>()
    };
    let mut pages = markdown(root());
    pages.extend(markdown(root().join("docs")));
    pages.push(root().join("bench/evidence/README.md"));
    assert!(pages.len() > 10, "{pages:?}");
    pages
}

#[test]
fn links_point_to_existing_files() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let target = link.split('#').next().unwrap();
            let path = page.parent().unwrap().join(target);
            assert!(path.exists(), "{}: {link}", page.display());
        }
    }
}

/// Lines of shell blocks that call the program, except for those that leave flags out.
fn commands(text: &str) -> Vec<String> {
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(str::lines).filter(|line| line.starts_with("loramux "));
    let whole = lines.filter(|line| !line.contains("..."));
    whole.map(|line| line.split(" #").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn commands_parse() {
    let mut count = 0;
    for page in pages() {
        for command in commands(&fs::read_to_string(&page).unwrap()) {
            let words = shlex::split(&command).unwrap().into_iter().map(OsString::from);
            if let Err(error) = loramux::args::parse(words) {
                panic!("{}: {command}: {error}", page.display());
            }
            count += 1;
        }
    }
    assert!(count >= 8, "{count} commands");
}
