//! Rejections: why something was refused, readable for people and matchable by programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

mod code;
mod config;
mod construction;
mod load;
mod runtime;

pub use code::Code;

/// The stage at which a rule is checked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stage {
    /// A configuration value, before a model or adapter is read.
    Config,
    /// The configuration with the model, when the engine is built.
    Construction,
    /// An adapter, when it is loaded.
    Load,
    /// A request or a step.
    Runtime,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Self; 4] = [Self::Config, Self::Construction, Self::Load, Self::Runtime];

    /// Its name in the documentation.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Construction => "construction",
            Self::Load => "load",
            Self::Runtime => "runtime",
        }
    }

    /// The rules that are checked at this stage. Each [`Code`] is in exactly one table.
    const fn rules(self) -> &'static [Rule] {
        match self {
            Self::Config => config::RULES,
            Self::Construction => construction::RULES,
            Self::Load => load::RULES,
            Self::Runtime => runtime::RULES,
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The description of a rule.
struct Rule {
    code: Code,
    /// Stable name, in kebab case.
    name: &'static str,
    /// Meaning: what is refused, and why.
    meaning: &'static str,
    /// Remedy: what the user can do.
    remedy: &'static str,
}

/// One broken rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Rejection {
    /// The rule.
    pub code: Code,
    /// The setting, tensor, module or file that breaks the rule.
    pub setting: String,
    /// The value that was found.
    pub found: String,
    /// The allowed values.
    pub allowed: String,
    /// The remedy.
    pub remedy: String,
}

impl Rejection {
    /// A rejection, from four phrases without full stops.
    pub fn new(
        code: Code,
        setting: impl Into<String>,
        found: impl Into<String>,
        allowed: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            code,
            setting: setting.into(),
            found: found.into(),
            allowed: allowed.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, setting, found, allowed, remedy } = self;
        write!(f, "{setting}: found {found}, allowed is {allowed}; {remedy} [{code}]")
    }
}

/// All rules that something breaks, in the order in which they were found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejections(pub Vec<Rejection>);

impl Rejections {
    /// `Ok` if it is empty.
    pub fn into_result(self) -> Result<(), Self> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    /// Whether one of them has this code.
    pub fn has(&self, code: Code) -> bool {
        self.0.iter().any(|r| r.code == code)
    }
}

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A rule that is broken in one layer is often broken in all layers.
        const SHOWN: usize = 3;
        let mut by_code: BTreeMap<Code, Vec<&Rejection>> = BTreeMap::new();
        for rejection in &self.0 {
            by_code.entry(rejection.code).or_default().push(rejection);
        }
        let mut separator = "";
        for (code, broken) in by_code {
            for rejection in broken.iter().take(SHOWN) {
                write!(f, "{separator}{rejection}")?;
                separator = "\n";
            }
            if broken.len() > SHOWN {
                write!(f, "\nand {} more [{code}]", broken.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Rejections {}

/// The first few of `names` and the number of others, so that messages on deep models stay readable.
#[cfg(feature = "formats")]
pub(crate) fn listed<S: fmt::Display>(names: &[S]) -> String {
    const SHOWN: usize = 8;
    let mut text: Vec<String> = names.iter().take(SHOWN).map(ToString::to_string).collect();
    if names.len() > SHOWN {
        text.push(format!("and {} more", names.len() - SHOWN));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_reads_as_one_sentence() {
        let r = Rejection::new(Code::RankOverLimit, "max_lora_rank", "rank 16", "at most 8", "x");
        assert_eq!(
            r.to_string(),
            "max_lora_rank: found rank 16, allowed is at most 8; x [rank-over-limit]"
        );
        assert!(Rejections(vec![]).into_result().is_ok());
        assert!(Rejections(vec![r]).into_result().is_err());
    }

    #[cfg(feature = "formats")]
    #[test]
    fn long_lists_are_cut() {
        assert_eq!(listed(&[1, 2]), "1, 2");
        assert!(listed(&[0; 20]).ends_with("and 12 more"));
    }
}
