//! Adapters by name on the command line.

use std::path::PathBuf;

use lora_core::validate_adapter_name;

/// One `--adapter NAME=PATH`.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct NamedAdapter {
    /// What requests call it.
    pub name: String,
    /// Its files.
    pub path: PathBuf,
}

/// Reads `NAME=PATH`; the first `=` divides, as paths may hold others.
pub(super) fn named_adapter(word: &str) -> Result<NamedAdapter, String> {
    let Some((name, path)) = word.split_once('=') else {
        return Err("there is no `=`; write NAME=PATH, such as sql=adapters/sql".to_owned());
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
    fn the_first_equals_sign_divides_name_and_path() {
        let adapter = named_adapter("a=b=c").unwrap();
        assert_eq!((adapter.name.as_str(), adapter.path), ("a", "b=c".into()));
        for bad in ["a", "=b", "a=", "a,b=c"] {
            assert!(named_adapter(bad).is_err(), "{bad}");
        }
    }
}
