//! Errors of the inner product.

use super::dtype::Dtype;

/// Operands that do not fit together, or weights that cannot be packed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InnerError {
    /// A part's bytes are not `rows * k` elements of its type.
    #[error(
        "weight part {part} holds {found} bytes, but {rows} rows of {k} {dtype:?} values take \
         {needed}; pass the tensor's own shape"
    )]
    PartBytes {
        /// Position in the list of parts.
        part: usize,
        /// Outputs that the part claims to hold.
        rows: usize,
        /// Inputs of every output.
        k: usize,
        /// Element type of the part.
        dtype: Dtype,
        /// Bytes that the part has.
        found: usize,
        /// Bytes that its shape needs.
        needed: usize,
    },
    /// Parts of one matrix differ in element type.
    #[error(
        "weight part {part} is {found:?}, but the parts before it are {needed:?}; convert it or \
         pack it as a matrix of its own"
    )]
    PartDtype {
        /// Position in the list of parts.
        part: usize,
        /// Its element type.
        found: Dtype,
        /// The element type of the first part.
        needed: Dtype,
    },
    /// The weights have more elements than memory can address.
    #[error("weights of {n} outputs and {k} inputs do not fit in memory; check the shape")]
    TooLarge {
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
    /// A buffer is shorter than its rows need.
    #[error(
        "{what} has {found} elements, but row {row} of {width} values at stride {stride} needs \
         {needed}; pass a longer slice or fewer rows"
    )]
    Short {
        /// Which operand.
        what: &'static str,
        /// The last row used.
        row: usize,
        /// Values in a row.
        width: usize,
        /// Elements from one row to the next.
        stride: usize,
        /// Elements present.
        found: usize,
        /// Elements needed.
        needed: usize,
    },
    /// Rows of the output would overlap.
    #[error("output stride {stride} is less than the {width} values of a row; use {width} or more")]
    Overlap {
        /// Elements from one row to the next.
        stride: usize,
        /// Values in a row.
        width: usize,
    },
    /// A list has the wrong number of entries.
    #[error("{what} has {found} entries where {needed} are needed")]
    Count {
        /// Which list.
        what: &'static str,
        /// Entries present.
        found: usize,
        /// Entries needed.
        needed: usize,
    },
}
