//! Ranks and alphas of modules: a default, and exceptions by pattern.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::adapter::pattern::{Budget, Pattern};
use crate::formats::read::fields::Fields;
use crate::rules::Rejection;

/// `r` with `rank_pattern`, or `lora_alpha` with `alpha_pattern`.
#[derive(Debug)]
pub(in super::super) struct Patterned<T> {
    field: &'static str,
    /// The value of modules that no pattern matches.
    pub default: T,
    exceptions: Vec<(Pattern, String, T)>,
}

impl<T: Copy> Patterned<T> {
    /// Reads the exceptions of `field`; wrong values and patterns are problems.
    pub fn read(
        fields: &mut Fields<'_>,
        field: &'static str,
        default: T,
        allowed: &str,
        convert: fn(&Value) -> Option<T>,
    ) -> Self {
        let none = Map::new();
        let map = fields.typed(field, "an object", Value::as_object).unwrap_or(&none);
        let mut exceptions = Vec::new();
        let mut budget = Budget::shared_by(field, map.keys());
        for (key, value) in map {
            let Some(converted) = convert(value) else {
                fields.invalid(&format!("{field}.{key}"), value, allowed);
                continue;
            };
            match Pattern::suffix(key, &mut budget) {
                Ok(pattern) => exceptions.push((pattern, key.clone(), converted)),
                Err(problem) => fields.problems.push(problem),
            }
        }
        Self { field, default, exceptions }
    }

    /// The value for a module: that of the first pattern in the file that matches. A rejection if matching
    /// takes too long.
    pub fn of(&self, module: &str) -> Result<T, Rejection> {
        for (pattern, _, value) in &self.exceptions {
            if pattern.matches(module)? {
                return Ok(*value);
            }
        }
        Ok(self.default)
    }

    /// A warning for each pattern that matches no module of the file.
    pub fn unused(&self, modules: &[Cow<'_, str>]) -> Result<Vec<String>, Rejection> {
        let mut warnings = Vec::new();
        for (pattern, key, _) in &self.exceptions {
            let mut used = false;
            for module in modules {
                used = used || pattern.matches(module)?;
            }
            if !used {
                warnings.push(format!("{}: `{key}` matches no module of the file", self.field));
            }
        }
        Ok(warnings)
    }
}

/// How the scale follows from alpha and rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum Scaling {
    /// `alpha / rank`.
    ByRank,
    /// `alpha / sqrt(rank)`: rank-stabilised LoRA.
    ByRootOfRank,
}

impl Scaling {
    /// The factor of `B A`.
    pub fn scale(self, alpha: f64, rank: usize) -> f32 {
        let rank = rank as f64;
        let divisor = match self {
            Self::ByRank => rank,
            Self::ByRootOfRank => rank.sqrt(),
        };
        (alpha / divisor) as f32
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::formats::read::fields::as_count;
    use crate::rules::Code;

    fn ranks(pattern: &Value) -> (Patterned<usize>, Vec<Code>) {
        let map = Map::from_iter([("rank_pattern".to_owned(), pattern.clone())]);
        let mut fields = Fields { map: &map, file: "file", problems: Vec::new() };
        let read = Patterned::read(&mut fields, "rank_pattern", 8, "a rank", as_count);
        (read, fields.problems.iter().map(|r| r.code).collect())
    }

    #[test]
    fn the_first_pattern_of_the_file_wins() {
        let (read, problems) = ranks(&json!({"1.mlp.up_proj": 2, "up_proj": 4}));
        assert!(problems.is_empty());
        assert_eq!(read.of("model.layers.1.mlp.up_proj"), Ok(2));
        assert_eq!(read.of("model.layers.11.mlp.up_proj"), Ok(4));
        assert_eq!(read.of("model.layers.1.mlp.down_proj"), Ok(8));
    }

    #[test]
    fn wrong_values_and_patterns_are_told() {
        let (_, problems) = ranks(&json!({"a": 0, "b": -1, "(": 4, "c": "4"}));
        use Code::*;
        assert_eq!(
            problems,
            [InvalidConfigField, InvalidConfigField, InvalidPattern, InvalidConfigField]
        );
        assert_eq!(ranks(&json!([1])).1, [InvalidConfigField]);
    }

    #[test]
    fn rank_stabilised_scales_divide_by_the_root() {
        assert_eq!(Scaling::ByRank.scale(16.0, 8), 2.0);
        assert_eq!(Scaling::ByRootOfRank.scale(16.0, 16), 4.0);
    }
}
