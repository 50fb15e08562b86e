//! Parsing of `--moe-layout`.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use lora_core::ExpertLayout;

/// Parses the name of a routed-expert layout.
pub(super) fn expert_layout() -> impl TypedValueParser<Value = ExpertLayout> {
    let names = PossibleValuesParser::new(ExpertLayout::ALL.map(ExpertLayout::name));
    names.try_map(|name| {
        let named = ExpertLayout::ALL.into_iter().find(|layout| layout.name() == name);
        named.ok_or("no layout of this name")
    })
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn every_layout_is_read_by_its_name() {
        for layout in ExpertLayout::ALL {
            let command = clap::Command::new("x").arg(Arg::new("l").value_parser(expert_layout()));
            let matches = command.try_get_matches_from(["x", layout.name()]).unwrap();
            assert_eq!(matches.get_one::<ExpertLayout>("l"), Some(&layout));
        }
    }
}
