//! Settings that a `config.json` can have under two names.

use std::fmt::Display;

use super::super::ModelError;

/// The value that a setting has under any of these names, the first of which wins; `None` if it is
/// under none.
///
/// # Errors
/// [`ModelError::Contradiction`] with two names whose values differ.
pub(super) fn agreed<T: PartialEq + Display>(
    fields: impl IntoIterator<Item = (&'static str, Option<T>)>,
) -> Result<Option<T>, ModelError> {
    let mut given = fields.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let Some((name, value)) = given.next() else { return Ok(None) };
    match given.find(|(_, other)| *other != value) {
        None => Ok(Some(value)),
        Some((other_name, other)) => Err(ModelError::Contradiction {
            fields: [name, other_name].map(str::to_owned),
            values: [value.to_string(), other.to_string()],
        }),
    }
}
