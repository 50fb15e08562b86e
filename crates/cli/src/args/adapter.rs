//! Adapters by name on the command line.

use std::path::PathBuf;

use lora_core::{LoraRequest, formats, validate_adapter_name};

/// One `--adapter NAME=PATH`.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct NamedAdapter {
    name: String,
    path: PathBuf,
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

/// Requests for the adapters, with ids 0, 1, 2, ... in the order given.
///
/// # Errors
/// A message naming the first name that is given twice.
pub(super) fn numbered(adapters: Vec<NamedAdapter>) -> Result<Vec<LoraRequest>, String> {
    let mut requests: Vec<LoraRequest> = Vec::with_capacity(adapters.len());
    for (id, NamedAdapter { name, path }) in (0..).zip(adapters) {
        if requests.iter().any(|known| known.lora_name == name) {
            return Err(format!("--adapter {name:?} is given twice; give each adapter its name"));
        }
        let source = formats::source_of(&path);
        requests.push(LoraRequest::new(name, id, path).with_ckpt_source(source));
    }
    Ok(requests)
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

    #[test]
    fn ids_follow_the_order_and_names_are_unique() {
        let read = |words: &[&str]| {
            numbered(words.iter().map(|word| named_adapter(word).unwrap()).collect())
        };
        let requests = read(&["x=1", "y=1"]).unwrap();
        assert_eq!(requests.iter().map(|r| r.lora_int_id).collect::<Vec<_>>(), [0, 1]);
        assert!(read(&["x=1", "x=2"]).unwrap_err().contains("\"x\" is given twice"));
    }
}
