//! Settings that a `config.json` may have under several names.

use std::fmt::Display;

use super::super::ModelError;

/// The value of a setting that may be given under several names; `None` if it is given under none.
///
/// # Errors
/// [`ModelError::Contradiction`] if it is given under two names with different values.
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
