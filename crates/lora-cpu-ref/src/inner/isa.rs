//! Which vector instructions a product may use.

/// Instruction sets that the inner product has code for, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of the build's target has.
    Baseline,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F.
    Avx512,
    /// AVX-512 F with `vdpbf16ps`.
    Avx512Bf16,
}

/// A level that this CPU has been asked for and has.
///
/// Holding one is the proof that code compiled for its level may run, so it can only be made by
/// [`Isa::detect`] and weakened by [`Isa::at_most`]. Results are reproducible for one `Isa`; two
/// levels may round differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

impl Isa {
    /// The best level of the CPU that the program runs on.
    pub fn detect() -> Self {
        Self(Self::best())
    }

    /// The same or a weaker level, for tests and for reproducing another machine's results.
    #[must_use]
    pub fn at_most(self, level: Level) -> Self {
        Self(self.0.min(level))
    }

    /// The level held.
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
