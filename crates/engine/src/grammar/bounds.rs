//! A limit on `multipleOf`, which llguidance does not have.
//!
//! llguidance compiles `multipleOf` to an automaton with as many states as the divisor, counted in 32 bits.
//! Several divisors of one number take as many states as their least common multiple. A short schema could
//! thus take unbounded time.

use serde_json::Value;

/// Most states for all `multipleOf` of a schema: they compile in under half a second.
const MAX_STATES: u64 = 200_000;

/// Most decimal places of a divisor: the largest power of ten that fits 32 bits.
const MAX_DECIMALS: u32 = 9;

/// Checks the `multipleOf` divisors of a schema.
///
/// # Errors
/// A message with the value found and the limit.
pub fn check_schema(schema: &Value) -> Result<(), String> {
    let mut divisors = Vec::new();
    collect(schema, &mut divisors);
    let states = states(&divisors);
    if states.is_some_and(|states| states <= MAX_STATES) {
        Ok(())
    } else {
        Err(format!(
            "the least common multiple of all `multipleOf`, in units of their last digit, times \
             their number ({}) is {}, but must be at most {MAX_STATES}",
            divisors.len(),
            states.map_or_else(|| "far larger".to_owned(), |states| states.to_string()),
        ))
    }
}

/// Refuses Lark grammars with embedded JSON schemas that use `multipleOf`: finding the divisors would require
/// parsing the grammar.
///
/// # Errors
/// A message with what was found and what to do.
pub fn check_grammar(grammar: &str) -> Result<(), String> {
    // A unicode escape could spell the keyword.
    let hidden = ["multipleOf", "\\u"].into_iter().find(|text| grammar.contains(text));
    match hidden {
        Some(found) if grammar.contains("%json") => Err(format!(
            "a grammar with `%json` has `{found}`, which is not supported there; use `json`"
        )),
        _ => Ok(()),
    }
}

fn collect(schema: &Value, divisors: &mut Vec<f64>) {
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_f64() {
                    Some(divisor) if name == "multipleOf" => divisors.push(divisor),
                    _ => collect(value, divisors),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, divisors)),
        _ => {}
    }
}

/// An upper bound of the automaton's states: the least common multiple of the divisors, in units of their
/// last decimal place, times the number of divisors. `None` on overflow, or if a divisor has too many decimal
/// places.
fn states(divisors: &[f64]) -> Option<u64> {
    let decimals = |divisor: &f64| {
        (0..=MAX_DECIMALS).find(|digits| {
            let scaled = divisor * 10f64.powi(*digits as i32);
            (scaled - scaled.round()).abs() < 1e-9 * scaled.abs()
        })
    };
    // llguidance itself refuses divisors that are not positive.
    let positive = divisors.iter().filter(|divisor| **divisor > 0.0);
    let unit = positive.clone().map(decimals).try_fold(0, |most, d| Some(most.max(d?)))?;
    let mut common = 1u64;
    for divisor in positive {
        let units = (divisor * 10f64.powi(unit as i32)).round();
        if units > u32::MAX.into() {
            return None;
        }
        let units = units as u64;
        common = (common / greatest_common_divisor(common, units)).checked_mul(units)?;
    }
    common.checked_mul(divisors.len().max(1) as u64)
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn states_are_the_least_common_multiple_times_the_count() {
        assert_eq!(states(&[]), Some(1));
        assert_eq!(states(&[0.01]), Some(1));
        assert_eq!(states(&[4.0, 6.0]), Some(24));
        assert_eq!(states(&[0.25, 5.0]), Some(1000));
        assert_eq!(states(&[1e-12]), None);
        assert_eq!(states(&[1e300]), None);
        assert_eq!(states(&[4_294_967_291.0, 4_294_967_279.0, 4_294_967_231.0]), None);
    }

    #[test]
    fn divisors_are_found_at_every_depth() {
        let deep = json!({"allOf": [{"items": {"multipleOf": 99_991}}, {"multipleOf": 9_973}]});
        assert!(check_schema(&deep).unwrap_err().contains("multipleOf"));
        let fine = json!({"properties": {"multipleOf": {"multipleOf": 0.05}}, "multipleOf": 100});
        assert_eq!(check_schema(&fine), Ok(()));
    }

    #[test]
    fn schemas_inside_a_grammar_cannot_hide_a_divisor() {
        for grammar in
            ["start: %json {\"multipleOf\": 7}", "start: %json {\"\\u006dultipleOf\": 7}"]
        {
            assert!(check_grammar(grammar).unwrap_err().contains("use `json`"));
        }
        assert_eq!(check_grammar("start: %json {\"type\": \"integer\"}"), Ok(()));
        assert_eq!(check_grammar("start: \"multipleOf \\u0041\""), Ok(()));
    }
}
