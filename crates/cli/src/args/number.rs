//! Parsing of floating-point flags.

use std::fmt::Display;
use std::str::FromStr;

/// Parses a finite number; `FromStr` alone would accept infinities and NaN.
///
/// # Errors
/// A message with what is allowed.
pub(super) fn finite<T: FromStr + Into<f64> + Copy>(word: &str) -> Result<T, String>
where
    T::Err: Display,
{
    let number: T = word.parse().map_err(|error: T::Err| error.to_string())?;
    if !number.into().is_finite() {
        return Err("it must be a finite number, such as 0.7".to_owned());
    }
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finite_numbers_are_accepted() {
        assert_eq!((finite("0.5"), finite("-2")), (Ok(0.5f32), Ok(-2.0f64)));
        for bad in ["nan", "inf", "-infinity", "1e39", "", "x"] {
            assert!(finite::<f32>(bad).is_err(), "{bad}");
        }
    }
}
