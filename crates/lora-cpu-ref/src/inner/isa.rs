//! Instruction sets.

/// Instruction sets that the inner product has code for, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The build target's baseline.
    Baseline,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F.
    Avx512,
    /// AVX-512 F with `vdpbf16ps`.
    Avx512Bf16,
}

/// An instruction set that was detected on this CPU.
///
/// Its existence proves that code for its level may run, so it can only be created by [`Isa::detect`] and
/// lowered by [`Isa::at_most`]. Results are reproducible for one `Isa`; levels may round differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

impl Isa {
    /// The highest level of this CPU.
    pub fn detect() -> Self {
        Self(Self::best())
    }

    /// The lower of the two levels, for tests and to reproduce results of another machine.
    #[must_use]
    pub fn at_most(self, level: Level) -> Self {
        Self(self.0.min(level))
    }

    /// Its level.
    pub fn level(self) -> Level {
        self.0
    }

    #[cfg(target_arch = "x86_64")]
    fn best() -> Level {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if !avx2 {
            return Level::Baseline;
        }
        if !is_x86_feature_detected!("avx512f") {
            return Level::Avx2;
        }
        if is_x86_feature_detected!("avx512bf16") { Level::Avx512Bf16 } else { Level::Avx512 }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn best() -> Level {
        Level::Baseline
    }
}
