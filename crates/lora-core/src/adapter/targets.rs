//! Decides which modules a PEFT configuration targets, by the rules of PEFT.

use std::borrow::Cow;

use super::pattern::{Budget, LayerPattern, Pattern};
use super::{Declaration, LayerFilter, Selector};
use crate::rules::Rejection;

/// A [`Declaration`] with its patterns compiled.
pub(crate) struct TargetMatcher<'a> {
    declaration: &'a Declaration,
    target: Option<Pattern>,
    exclude: Option<Pattern>,
    layers: Vec<LayerPattern>,
}

impl<'a> TargetMatcher<'a> {
    /// Compiles the patterns; invalid ones are rejections.
    pub(crate) fn new(declaration: &'a Declaration) -> Result<Self, Vec<Rejection>> {
        let mut problems = Vec::new();
        let mut selector = |field, selector: Option<&Selector>| match selector {
            Some(Selector::Pattern(text)) => {
                let pattern = Pattern::full(text, &mut Budget::shared_by(field, [text]));
                pattern.map_err(|problem| problems.push(problem)).ok()
            }
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
    /// `model.layers.1.mlp.down_proj` or `lm_head`; a rejection if matching takes too long.
    pub(crate) fn targets(&self, name: &str) -> Result<bool, Rejection> {
        let targets = &self.declaration.targets;
        if self.leaves_out(name)? || !selects(targets, self.target.as_ref(), name)? {
            return Ok(false);
        }
        match targets {
            // PEFT compares full names before it looks at layers.
            Selector::Names(names) if names.iter().any(|n| n == name) => Ok(true),
            Selector::Pattern(_) => Ok(true),
            Selector::Names(_) | Selector::AllLinear => self.in_chosen_layer(name),
        }
    }

    /// Whether the configuration excludes the module of this name, irrespective of its targets.
    pub(crate) fn leaves_out(&self, name: &str) -> Result<bool, Rejection> {
        let declared = self.declaration;
        if let Some(exclude) = &declared.exclude
            && selects(exclude, self.exclude.as_ref(), name)?
        {
            return Ok(true);
        }
        Ok(declared.saved.iter().any(|saved| names_part(name, saved)))
    }

    /// Whether the name is in a chosen layer. PEFT uses the first pattern that matches, even if it finds no
    /// number.
    fn in_chosen_layer(&self, name: &str) -> Result<bool, Rejection> {
        let Some(filter) = &self.declaration.layers else { return Ok(true) };
        for pattern in &self.layers {
            if let Some(layer) = pattern.layer_of(name)? {
                return Ok(layer.is_some_and(|layer| filter.layers.contains(&layer)));
            }
        }
        Ok(false)
    }
}

impl Declaration {
    /// Whether the configuration puts LoRA on the parameter of this name, such as
    /// `model.layers.1.mlp.experts.down_proj`.
    pub(crate) fn targets_parameter(&self, name: &str) -> bool {
        self.parameters.iter().any(|target| ends_with_name(name, target))
    }

    /// PEFT's name of the trained object in the module of this name: its weight if `target_parameters`
    /// names it, else the module.
    pub(crate) fn trained<'a>(&self, module: &'a str) -> Cow<'a, str> {
        let weight = format!("{module}.weight");
        if self.targets_parameter(&weight) { weight.into() } else { module.into() }
    }
}

fn selects(selector: &Selector, pattern: Option<&Pattern>, name: &str) -> Result<bool, Rejection> {
    match selector {
        Selector::Names(names) => Ok(names.iter().any(|suffix| ends_with_name(name, suffix))),
        Selector::Pattern(_) => pattern.map_or(Ok(false), |pattern| pattern.matches(name)),
        Selector::AllLinear => {
            let last = name.rsplit('.').next().unwrap_or(name);
            Ok(!matches!(last, "lm_head" | "embed_tokens"))
        }
    }
}

/// Whether `name` is `suffix`, or ends with a dot and `suffix`.
pub(crate) fn ends_with_name(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// Whether `saved` is a dotted component of `name`, or several consecutive ones.
fn names_part(name: &str, saved: &str) -> bool {
    format!(".{name}.").contains(&format!(".{saved}."))
}

fn compile_layers(
    filter: Option<&LayerFilter>,
    problems: &mut Vec<Rejection>,
) -> Vec<LayerPattern> {
    let Some(filter) = filter else { return Vec::new() };
    let mut budget = Budget::shared_by("layers_pattern", &filter.patterns);
    let compiled: Vec<_> = if filter.patterns.is_empty() {
        vec![LayerPattern::any(&mut budget)]
    } else {
        filter.patterns.iter().map(|text| LayerPattern::named(text, &mut budget)).collect()
    };
    let mut layers = Vec::with_capacity(compiled.len());
    for pattern in compiled {
        match pattern {
            Ok(pattern) => layers.push(pattern),
            Err(problem) => problems.push(problem),
        }
    }
    layers
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::rules::Code;

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
            saved_sites: BTreeSet::new(),
        }
    }

    fn names(list: &[&str]) -> Selector {
        Selector::Names(list.iter().map(ToString::to_string).collect())
    }

    fn hits(declaration: &Declaration, name: &str) -> bool {
        TargetMatcher::new(declaration).ok().unwrap().targets(name).unwrap()
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
        for bad in [r"(?<n>y)", "a)(b", "("] {
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
    fn patterns_of_layers_find_the_first_number() {
        let mut d = declare(names(&["up_proj"]));
        let mut chosen = |patterns: &[&str], name| {
            let patterns = patterns.iter().map(ToString::to_string).collect();
            d.layers = Some(LayerFilter { layers: BTreeSet::from([2]), patterns });
            hits(&d, name)
        };
        assert!(chosen(&[], "model.layers.2.mlp.experts.7.up_proj"));
        assert!(!chosen(&[], "model.layers.7.mlp.experts.2.up_proj"));
        assert!(chosen(&["h", "lay(?=ers).*s"], "model.layers.2.mlp.up_proj"));
        assert!(chosen(&["layers"], "layers.2.mlp.up_proj"));
        // PEFT puts no group around a pattern, so this one finds no number.
        assert!(!chosen(&["model|layers"], "model.layers.2.mlp.up_proj"));
    }
}
