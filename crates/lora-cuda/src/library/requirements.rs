//! Requirements of the kernels.

/// The environment variable that names the folder of compiled kernels.
pub const FOLDER_VARIABLE: &str = "LORAMUX_KERNELS";

/// Compute capability that kernels are compiled for.
pub const CAPABILITY: &str = "9.0";
