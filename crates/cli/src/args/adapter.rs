//! Parsing of `--adapter NAME=PATH`.

use std::path::PathBuf;

use lora_core::validate_adapter_name;

/// One `--adapter NAME=PATH`.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct NamedAdapter {
    /// The name that requests use.
    pub name: String,
    /// A PEFT folder or a `.nemo` archive.
    pub path: PathBuf,
}

/// Parses `NAME=PATH`, split at the first `=`, as paths may contain further ones.
pub(super) fn named_adapter(word: &str) -> Result<NamedAdapter, String> {
    let Some((name, path)) = word.split_once('=') else {
        return Err("`=` is missing; write NAME=PATH, such as sql=adapters/sql".to_owned());
    };
    validate_adapter_name(name).map_err(|problem| problem.to_string())?;
    if path.is_empty() {
        return Err(format!("adapter {name:?} has no path; write NAME=PATH"));
    }
    Ok(NamedAdapter { name: name.to_owned(), path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_equals_sign_splits_name_and_path() {
        let adapter = named_adapter("a=b=c").unwrap();
        assert_eq!((adapter.name.as_str(), adapter.path), ("a", "b=c".into()));
        for bad in ["a", "=b", "a=", "a,b=c"] {
            assert!(named_adapter(bad).is_err(), "{bad}");
        }
    }
}
