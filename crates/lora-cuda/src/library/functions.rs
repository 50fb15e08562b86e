//! Every kernel of this crate by name.

macro_rules! kernels {
    ($($variant:ident: $name:literal in $unit:literal),* $(,)?) => {
        /// A kernel.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Kernel { $(#[doc = $name] $variant),* }

        impl Kernel {
            /// Every kernel.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in the source.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The source file.
            pub const fn unit(self) -> &'static str {
                match self { $(Self::$variant => $unit),* }
            }
        }
    };
}

kernels! {
    GatherRows: "gather_rows" in "rows.cu",
    GatherRowsVec8: "gather_rows_vec8" in "rows.cu",
    SiluMul: "silu_mul" in "rows.cu",
    SiluMulVec8: "silu_mul_vec8" in "rows.cu",
    RmsNorm: "rms_norm" in "norm.cu",
    AddRmsNorm: "add_rms_norm" in "norm.cu",
    RmsNormVec8: "rms_norm_vec8" in "norm.cu",
    QkNormRopeAppend: "qk_norm_rope_append" in "rope.cu",
    QkNormRopeAppend64: "qk_norm_rope_append_64" in "rope.cu",
    QkNormRopeAppend128: "qk_norm_rope_append_128" in "rope.cu",
    QkNormRopeAppend256: "qk_norm_rope_append_256" in "rope.cu",
    Attention: "attention" in "attention.cu",
    AttentionDecode64: "attention_decode_64" in "attention_decode.cu",
    AttentionDecode96: "attention_decode_96" in "attention_decode.cu",
    AttentionDecode128: "attention_decode_128" in "attention_decode.cu",
    AttentionDecode256: "attention_decode_256" in "attention_decode.cu",
    AttentionPrefill64: "attention_prefill_64" in "attention_prefill.cu",
    AttentionPrefill128: "attention_prefill_128" in "attention_prefill.cu",
    Linear: "linear" in "linear.cu",
    LinearStream: "linear_stream" in "linear_stream.cu",
    LinearTiles: "linear_tiles" in "linear_tiles.cu",
    LinearTilesBegin: "linear_tiles_begin" in "linear_tiles.cu",
    LinearTilesGate: "linear_tiles_gate" in "linear_tiles.cu",
    LinearTilesGateAdded: "linear_tiles_gate_added" in "linear_tiles.cu",
    QuantiseRows: "quantise_rows" in "linear.cu",
    QuantiseRowsVec8: "quantise_rows_vec8" in "linear.cu",
    RowNorms: "row_norms" in "linear.cu",
    LoraShrink: "lora_shrink" in "lora.cu",
    LoraExpand: "lora_expand" in "lora.cu",
    LoraRows: "lora_rows" in "lora.cu",
    LoraShrinkMma: "lora_shrink_mma" in "lora_mma.cu",
    LoraShrinkRows1: "lora_shrink_rows1" in "lora_shrink.cu",
    LoraShrinkRows2: "lora_shrink_rows2" in "lora_shrink.cu",
    LoraShrinkRows4: "lora_shrink_rows4" in "lora_shrink.cu",
    LoraExpandMma8: "lora_expand_mma8" in "lora_mma.cu",
    LoraExpandMma32: "lora_expand_mma32" in "lora_mma.cu",
    LoraBeginMma8: "lora_begin_mma8" in "lora_mma.cu",
    LoraBeginMma32: "lora_begin_mma32" in "lora_mma.cu",
    Sample: "sample" in "sample.cu",
    Logprobs: "logprobs" in "logprobs.cu",
}

impl Kernel {
    /// The most bytes of dynamic shared memory that a launch may ask for, which the driver must be told when the
    /// kernel is loaded. Ops whose launches take more than the usual limit check it where they compute the size.
    pub const fn max_shared(self) -> usize {
        match self {
            Self::LinearStream => 200 << 10,
            Self::LinearTiles
            | Self::LinearTilesBegin
            | Self::LinearTilesGate
            | Self::LinearTilesGateAdded => 232_320,
            Self::LoraShrinkRows1 | Self::LoraShrinkRows2 | Self::LoraShrinkRows4 => 99_404,
            _ => 128 << 10,
        }
    }
}
