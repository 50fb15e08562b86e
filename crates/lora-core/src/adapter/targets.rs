//! Which modules a PEFT configuration targets, by PEFT's own matching rules.

use regex::Regex;

use super::{Declaration, LayerFilter, Selector};
use crate::rules::{Code, Rejection};

/// A [`Declaration`] with its patterns compiled.
pub(crate) struct TargetMatcher<'a> {
    declaration: &'a Declaration,
    target: Option<Regex>,
    exclude: Option<Regex>,
    layers: Vec<Regex>,
}

impl<'a> TargetMatcher<'a> {
    /// Compiles the patterns; every one that cannot be read is a rejection.
    pub(crate) fn new(declaration: &'a Declaration) -> Result<Self, Vec<Rejection>> {
        let mut problems = Vec::new();
        let mut selector = |field: &str, selector: Option<&Selector>| match selector {
            Some(Selector::Pattern(pattern)) => full_match(field, pattern, &mut problems),
            _ => None,
        };
        let target = selector("target_modules", Some(&declaration.targets));
        let exclude = selector("exclude_modules", declaration.exclude.as_ref());
        let layers = compile_layers(declaration.layers.as_ref(), &mut problems);
        if problems.is_empty() {
            Ok(Self { declaration, target, exclude, layers })
        } else {
            Err(problems)
        }
    }

    /// Whether the configuration puts LoRA on the module of this name, such as
    /// `model.layers.1.mlp.down_proj` or `lm_head`.
    pub(crate) fn targets(&self, name: &str) -> bool {
        let declared = self.declaration;
        if declared.exclude.as_ref().is_some_and(|s| selects(s, self.exclude.as_ref(), name)) {
            return false;
        }
        if declared.saved.iter().any(|saved| names_part(name, saved)) {
            return false;
        }
        match &declared.targets {
            // PEFT compares whole names before it looks at layers.
            Selector::Names(names) if names.iter().any(|n| n == name) => true,
            Selector::Names(_) => {
                selects(&declared.targets, None, name) && self.in_chosen_layer(name)
            }
            Selector::Pattern(_) => selects(&declared.targets, self.target.as_ref(), name),
            Selector::AllLinear => {
                selects(&declared.targets, None, name) && self.in_chosen_layer(name)
            }
        }
    }

    /// Whether the configuration puts LoRA on the parameter of this name, such as
    /// `model.layers.1.mlp.experts.down_proj`.
    pub(crate) fn targets_parameter(&self, name: &str) -> bool {
        self.declaration.parameters.iter().any(|target| ends_with_name(name, target))
    }

    fn in_chosen_layer(&self, name: &str) -> bool {
        let Some(filter) = &self.declaration.layers else { return true };
        let number = self.layers.iter().find_map(|pattern| pattern.captures(name)?.get(1));
        number
            .and_then(|digits| digits.as_str().parse().ok())
            .is_some_and(|layer| filter.layers.contains(&layer))
    }
}

fn selects(selector: &Selector, pattern: Option<&Regex>, name: &str) -> bool {
    match selector {
        Selector::Names(names) => names.iter().any(|suffix| ends_with_name(name, suffix)),
        Selector::Pattern(_) => pattern.is_some_and(|pattern| pattern.is_match(name)),
        Selector::AllLinear => {
            let last = name.rsplit('.').next().unwrap_or(name);
            !matches!(last, "lm_head" | "embed_tokens")
        }
    }
}

/// Whether `name` is `suffix`, or ends with a dot and `suffix`.
pub(crate) fn ends_with_name(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// Whether `saved` is one of the dotted components of `name`, or several of them in a row.
fn names_part(name: &str, saved: &str) -> bool {
    format!(".{name}.").contains(&format!(".{saved}."))
}

/// A pattern that must match a whole name, as `re.fullmatch` does.
fn full_match(field: &str, pattern: &str, problems: &mut Vec<Rejection>) -> Option<Regex> {
    compile(field, pattern, |p| format!("^(?:{p})$"), problems)
}

/// A key of `rank_pattern` or `alpha_pattern`: it matches the end of a name, from a dot or from
/// the start, as PEFT's `(.*\.)?(KEY)$` does.
pub(crate) fn suffix_match(field: &str, key: &str, problems: &mut Vec<Rejection>) -> Option<Regex> {
    compile(field, key, |p| format!(r"^(?:.*\.)?(?:{p})$"), problems)
}

fn compile_layers(filter: Option<&LayerFilter>, problems: &mut Vec<Rejection>) -> Vec<Regex> {
    let Some(filter) = filter else { return Vec::new() };
    let any = [r"[^.]*".to_owned()];
    let patterns = if filter.patterns.is_empty() { &any[..] } else { &filter.patterns[..] };
    patterns
        .iter()
        .filter_map(|p| {
            compile("layers_pattern", p, |p| format!(r"^.*\.(?:{p})\.(\d+)\."), problems)
        })
        .collect()
}

fn compile(
    field: &str,
    pattern: &str,
    anchor: impl Fn(&str) -> String,
    problems: &mut Vec<Rejection>,
) -> Option<Regex> {
    // The pattern by itself comes first: an unbalanced one could become valid inside a group.
    match Regex::new(pattern).and_then(|_| Regex::new(&anchor(pattern))) {
        Ok(regex) => Some(regex),
        Err(error) => {
            let reason = error.to_string().lines().last().unwrap_or_default().trim().to_owned();
            problems.push(Rejection::new(
                Code::InvalidPattern,
                field,
                format!("`{pattern}` ({reason})"),
                "a regular expression without look-around and back-references",
                "write the module names out in full",
            ));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn declare(targets: Selector) -> Declaration {
        Declaration {
            targets,
            parameters: Vec::new(),
            exclude: None,
            layers: None,
            saved: Vec::new(),
            ensure_weight_tying: false,
            root: "model.".into(),
            naming: BTreeMap::new(),
            saved_base: BTreeSet::new(),
        }
    }

    fn names(list: &[&str]) -> Selector {
        Selector::Names(list.iter().map(ToString::to_string).collect())
    }

    fn hits(declaration: &Declaration, name: &str) -> bool {
        TargetMatcher::new(declaration).ok().unwrap().targets(name)
    }

    #[test]
    fn names_match_whole_components_at_the_end() {
        let d = declare(names(&["q_proj", "1.mlp.down_proj"]));
        assert!(hits(&d, "model.layers.0.self_attn.q_proj"));
        assert!(hits(&d, "model.layers.1.mlp.down_proj"));
        assert!(!hits(&d, "model.layers.11.mlp.down_proj"));
        assert!(!hits(&d, "model.layers.0.self_attn.xq_proj"));
        assert!(!hits(&d, "lm_head"));
    }

    #[test]
    fn patterns_must_match_the_whole_name() {
        let d = declare(Selector::Pattern(r".*layers\.[01]\.self_attn\.(q|v)_proj".into()));
        assert!(hits(&d, "model.layers.1.self_attn.v_proj"));
        assert!(!hits(&d, "model.layers.2.self_attn.v_proj"));
        assert!(!hits(&d, "model.layers.1.self_attn.v_proj_2"));
        for bad in [r"(?=x)y", "a)(b", "("] {
            let problems = TargetMatcher::new(&declare(Selector::Pattern(bad.into()))).err();
            assert_eq!(problems.unwrap()[0].code, Code::InvalidPattern);
        }
    }

    #[test]
    fn exclusions_saved_modules_and_layers_narrow_the_targets() {
        let mut d = declare(Selector::AllLinear);
        assert!(hits(&d, "model.layers.0.mlp.up_proj") && !hits(&d, "lm_head"));
        d.exclude = Some(names(&["up_proj"]));
        assert!(!hits(&d, "model.layers.0.mlp.up_proj"));
        d.layers = Some(LayerFilter { layers: BTreeSet::from([2]), patterns: Vec::new() });
        assert!(!hits(&d, "model.layers.0.mlp.down_proj"));
        assert!(hits(&d, "model.layers.2.mlp.down_proj"));
        d.layers = Some(LayerFilter { layers: BTreeSet::from([2]), patterns: vec!["h".into()] });
        assert!(!hits(&d, "model.layers.2.mlp.down_proj"));
        let mut d = declare(names(&["lm_head"]));
        assert!(hits(&d, "lm_head"));
        d.saved = vec!["lm_head".into()];
        assert!(!hits(&d, "lm_head"));
    }

    #[test]
    fn pattern_keys_match_from_a_dot_or_from_the_start() {
        let mut problems = Vec::new();
        let key = suffix_match("rank_pattern", "layers.1.mlp.down_proj", &mut problems).unwrap();
        assert!(key.is_match("model.layers.1.mlp.down_proj"));
        assert!(!key.is_match("model.xlayers.1.mlp.down_proj"));
        let anchored = suffix_match("rank_pattern", r"^model\.layers\.0.*", &mut problems).unwrap();
        assert!(anchored.is_match("model.layers.0.mlp.up_proj"));
        assert!(problems.is_empty());
    }
}
