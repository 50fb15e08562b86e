//! Flag files: an argument `@FILE` is replaced by the arguments in FILE.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Command;
use clap::error::ErrorKind;
use lora_core::files;

/// The prefix of an argument that names a flag file.
const MARK: char = '@';

/// Replaces every `@FILE` by the arguments in FILE, except where it is the value of a flag of `cli`, such as a prompt
/// that starts with `@`.
///
/// # Errors
/// If a file cannot be read, or leaves a quotation open.
pub(super) fn expand(
    words: impl IntoIterator<Item = OsString>,
    cli: &Command,
) -> Result<Vec<OsString>, clap::Error> {
    let mut expanded: Vec<OsString> = Vec::new();
    for word in words {
        let path = word.to_str().and_then(|word| word.strip_prefix(MARK)).map(Path::new);
        let is_value = expanded.last().is_some_and(|before| takes_value(cli, before));
        match path.filter(|_| !is_value) {
            Some(path) => {
                let words = read(path).map_err(|problem| {
                    let message = format!("{MARK}{}: {problem}\n", path.display());
                    clap::Error::raw(ErrorKind::Io, message).with_cmd(cli)
                })?;
                expanded.extend(words.into_iter().map(OsString::from));
            }
            None => expanded.push(word),
        }
    }
    Ok(expanded)
}

/// Whether `word` is a flag that takes the next argument as its value.
fn takes_value(cli: &Command, word: &OsStr) -> bool {
    let Some(flag) = word.to_str().and_then(|word| word.strip_prefix("--")) else { return false };
    let mut arguments = cli.get_subcommands().flat_map(Command::get_arguments);
    arguments.any(|arg| arg.get_long() == Some(flag) && arg.get_action().takes_values())
}

fn read(path: &Path) -> Result<Vec<String>, String> {
    let text = files::read_text(path, files::MAX_CONFIG).map_err(|error| error.to_string())?;
    shlex::split(&text).ok_or_else(|| "a quotation or the last line is left open".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::Cli;
    use super::*;

    fn expanded(words: &[&str]) -> Result<Vec<String>, String> {
        let words = words.iter().map(OsString::from);
        let expanded = expand(words, &Cli::command()).map_err(|error| error.to_string())?;
        Ok(expanded.into_iter().map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn words_of_a_file_are_written_as_in_a_shell() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flags");
        std::fs::write(&path, "--adapter a=b # the first\n\n# another\n--stop 'x y'\n").unwrap();
        let file = format!("@{}", path.display());
        let words = expanded(&["loramux", "generate", &file, "--n", "2"]).unwrap();
        let expected = ["loramux", "generate", "--adapter", "a=b", "--stop", "x y", "--n", "2"];
        assert_eq!(words, expected);
        std::fs::write(&path, "'open").unwrap();
        assert!(expanded(&["loramux", &file]).unwrap_err().contains("left open"));
    }

    #[test]
    fn values_are_left_and_missing_files_are_named() {
        let prompt = ["loramux", "generate", "--prompt", "@somebody"];
        assert_eq!(expanded(&prompt).unwrap(), prompt);
        let error = expanded(&["loramux", "generate", "--ignore-eos", "@absent"]).unwrap_err();
        assert!(error.contains("@absent"), "{error}");
    }
}
