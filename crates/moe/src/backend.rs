//! Names of MoE backends, as in TensorRT-LLM's `moe_backend`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A value of `moe_backend`, or of `backend` in `moe_config`.
///
/// Parsing ignores case; names are written in upper case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(into = "&'static str", try_from = "String")]
#[non_exhaustive]
pub enum MoeBackendName {
    /// Chosen by the engine; see [`MoeBackendName::resolve`].
    #[default]
    Auto,
    /// CUTLASS grouped GEMM; the only backend with LoRA on routed experts.
    Cutlass,
    /// Kernels in CuTe DSL.
    Cutedsl,
    /// Kernels generated for TensorRT-LLM.
    Trtllm,
    /// DeepGEMM.
    Deepgemm,
    /// Dense computation of all experts.
    Densegemm,
    /// One expert after another, as a reference.
    Vanilla,
    /// Kernels in Triton.
    Triton,
    /// Wide expert parallelism.
    Wideep,
    /// Marlin: 4-bit weights, 16-bit activations.
    Marlin,
}

/// One row per backend, in the order of the enum.
const TABLE: [(MoeBackendName, &str); 10] = [
    (MoeBackendName::Auto, "AUTO"),
    (MoeBackendName::Cutlass, "CUTLASS"),
    (MoeBackendName::Cutedsl, "CUTEDSL"),
    (MoeBackendName::Trtllm, "TRTLLM"),
    (MoeBackendName::Deepgemm, "DEEPGEMM"),
    (MoeBackendName::Densegemm, "DENSEGEMM"),
    (MoeBackendName::Vanilla, "VANILLA"),
    (MoeBackendName::Triton, "TRITON"),
    (MoeBackendName::Wideep, "WIDEEP"),
    (MoeBackendName::Marlin, "MARLIN"),
];

/// An unknown backend name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("moe_backend: found `{0}`, allowed is one of {known}; use CUTLASS or AUTO", known = names())]
pub struct UnknownMoeBackend(
    /// The unknown name.
    pub String,
);

fn names() -> String {
    MoeBackendName::all().map(MoeBackendName::name).collect::<Vec<_>>().join(", ")
}

impl MoeBackendName {
    /// Its name.
    pub fn name(self) -> &'static str {
        // The table has one row per variant, in order: see the test below.
        TABLE[self as usize].1
    }

    /// Every backend, [`MoeBackendName::Auto`] first.
    pub fn all() -> impl ExactSizeIterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The actual backend: CUTLASS for `AUTO`, whatever the model and device.
    #[must_use]
    pub fn resolve(self) -> Self {
        if self == Self::Auto { Self::Cutlass } else { self }
    }
}

impl FromStr for MoeBackendName {
    type Err = UnknownMoeBackend;

    fn from_str(text: &str) -> Result<Self, UnknownMoeBackend> {
        let row = TABLE.iter().find(|row| row.1.eq_ignore_ascii_case(text));
        row.map(|row| row.0).ok_or_else(|| UnknownMoeBackend(text.to_owned()))
    }
}

impl TryFrom<String> for MoeBackendName {
    type Error = UnknownMoeBackend;

    fn try_from(text: String) -> Result<Self, UnknownMoeBackend> {
        text.parse()
    }
}

impl From<MoeBackendName> for &'static str {
    fn from(backend: MoeBackendName) -> Self {
        backend.name()
    }
}

impl fmt::Display for MoeBackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case_and_written_in_capitals() {
        for (i, backend) in MoeBackendName::all().enumerate() {
            assert_eq!(backend as usize, i);
            assert_eq!(format!("{backend:?}").to_uppercase(), backend.name());
            let small = format!("\"{}\"", backend.name().to_lowercase());
            assert_eq!(serde_json::from_str::<MoeBackendName>(&small).unwrap(), backend);
            let written = serde_json::to_string(&backend).unwrap();
            assert_eq!(written, small.to_uppercase());
        }
        assert_eq!(MoeBackendName::Marlin as usize, MoeBackendName::all().len() - 1);
    }

    #[test]
    fn unknown_names_are_refused_with_those_that_are_known() {
        let error = serde_json::from_str::<MoeBackendName>("\"cutlas\"").unwrap_err().to_string();
        assert!(error.contains("`cutlas`") && error.contains("CUTLASS, CUTEDSL"), "{error}");
    }

    #[test]
    fn auto_means_cutlass_and_others_mean_themselves() {
        for backend in MoeBackendName::all() {
            let expected =
                if backend == MoeBackendName::Auto { MoeBackendName::Cutlass } else { backend };
            assert_eq!(backend.resolve(), expected);
        }
    }
}
