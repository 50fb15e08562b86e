//! Releases of PEFT, as `peft_version` names them.

/// A release; later ones are greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Release([u32; 3]);

impl Release {
    /// The first release in which A has the inputs of `target_parameters` for all models, also for those that
    /// store experts as `[E, out, in]`.
    pub const ROLES_CHANGED: Self = Self([0, 19, 1]);

    /// Parses `0.19.1`, also with a suffix as in `0.19.2.dev0`; `None` for anything else.
    pub fn parse(version: &str) -> Option<Self> {
        let mut numbers = version.trim().splitn(4, '.').map(|part| {
            let digits = part.bytes().take_while(u8::is_ascii_digit).count();
            part[..digits].parse().ok()
        });
        Some(Self([numbers.next()??, numbers.next()??, numbers.next()??]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_number() {
        let release = |text| Release::parse(text).unwrap();
        assert!(release("0.9.0") < release("0.18.1") && release("0.19.0") < Release::ROLES_CHANGED);
        assert!(release("0.19.1") >= Release::ROLES_CHANGED);
        assert!(
            release("0.21.2.dev0") > Release::ROLES_CHANGED
                && release("1.0.0rc1") > release("0.30.0")
        );
        for bad in ["", "0.19", "x.y.z", "0..1"] {
            assert_eq!(Release::parse(bad), None, "{bad}");
        }
    }
}
