//! Synthetic adapters for routed experts, in the layout that they have in memory: one pair of stacks for each
//! module, A `[experts, rank, in]` and B `[experts, out, rank]`, indexed by expert number.

use lora_core::{DType, HostTensor, LowRank, RowOrder};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// A matrix that all experts share and that is stored once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SharedSide {
    /// A `[1, rank, in]`, as usual for gate and up projections.
    A,
    /// B `[1, out, rank]`, as usual for the down projection.
    B,
}

/// Parameters of a synthetic pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PerExpertRecipe {
    /// Number of routed experts, at least 1.
    pub num_experts: usize,
    /// Rank of every expert, at least 1.
    pub rank: usize,
    /// Input features of one expert's projection, at least 1.
    pub in_dim: usize,
    /// Output features of one expert's projection, at least 1.
    pub out_dim: usize,
    /// Element type of both tensors: one of the floating-point types.
    pub dtype: DType,
    /// Random seed; the same seed gives the same numbers on every machine.
    pub seed: u64,
    /// The matrix that all experts share, if any.
    pub shared_side: Option<SharedSide>,
}

/// Why a pair could not be created.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A size is zero.
    #[error("{setting}: found 0, allowed is at least 1; give the size of the module")]
    ZeroExtent {
        /// The size.
        setting: &'static str,
    },
    /// The dtype is not a float.
    #[error("dtype: found {found}, allowed is float32, float16 or bfloat16; choose one of them")]
    NotFloat {
        /// The type that was asked for.
        found: DType,
    },
    /// A tensor would have more elements than memory can hold.
    #[error("shape: found {found:?}, allowed is what fits in memory; ask for less")]
    TooLarge {
        /// The tensor's extents.
        found: [usize; 3],
    },
}

/// The matrices of one module's routed experts.
#[derive(Clone, PartialEq, Debug)]
pub struct PerExpertLora {
    num_experts: usize,
    a: HostTensor,
    b: HostTensor,
}

/// Creates A and B for `num_experts` experts, with independent standard normal elements.
///
/// The matrices of an expert depend on `seed`, the expert number and their size, but not on the number of
/// experts. B is not zero, unlike in an untrained adapter.
///
/// ```
/// use lora_core::DType;
/// use loramux_moe::layout::make_per_expert_lora;
///
/// let fc1 = make_per_expert_lora(8, 16, 2048, 5632, DType::Bf16, 0)?;
/// assert_eq!(fc1.a().shape(), [8, 16, 2048]);
/// assert_eq!(fc1.b().shape(), [8, 5632, 16]);
/// # Ok::<(), loramux_moe::layout::LayoutError>(())
/// ```
///
/// # Errors
/// See [`LayoutError`].
pub fn make_per_expert_lora(
    num_experts: usize,
    rank: usize,
    in_dim: usize,
    out_dim: usize,
    dtype: DType,
    seed: u64,
) -> Result<PerExpertLora, LayoutError> {
    PerExpertRecipe { num_experts, rank, in_dim, out_dim, dtype, seed, shared_side: None }.make()
}

impl PerExpertRecipe {
    /// Creates the pair; see [`make_per_expert_lora`]. A shared matrix is that of expert 0.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn make(&self) -> Result<PerExpertLora, LayoutError> {
        let Self { num_experts, rank, in_dim, out_dim, dtype, .. } = *self;
        let sizes = [
            ("num_experts", num_experts),
            ("rank", rank),
            ("in_dim", in_dim),
            ("out_dim", out_dim),
        ];
        if let Some((setting, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(LayoutError::ZeroExtent { setting });
        }
        if !dtype.is_float() {
            return Err(LayoutError::NotFloat { found: dtype });
        }
        let a = self.stack(SharedSide::A, [rank, in_dim])?;
        let b = self.stack(SharedSide::B, [out_dim, rank])?;
        Ok(PerExpertLora { num_experts, a, b })
    }

    fn stack(&self, side: SharedSide, matrix: [usize; 2]) -> Result<HostTensor, LayoutError> {
        let experts = if self.shared_side == Some(side) { 1 } else { self.num_experts };
        let shape = [experts, matrix[0], matrix[1]];
        let too_large = LayoutError::TooLarge { found: shape };
        let elements = shape.into_iter().try_fold(1usize, usize::checked_mul);
        let mut values: Vec<f32> = Vec::new();
        let room = elements.map(|count| values.try_reserve_exact(count));
        if !matches!(room, Some(Ok(()))) {
            return Err(too_large);
        }
        for expert in 0..experts {
            let numbers = StandardNormal.sample_iter(self.stream(side, expert));
            values.extend(numbers.take(matrix[0] * matrix[1]).map(|number: f32| number));
        }
        HostTensor::from_f32(self.dtype, shape.to_vec(), &values).ok_or(too_large)
    }

    /// The random numbers for one matrix; different matrices of a seed get different streams.
    fn stream(&self, side: SharedSide, expert: usize) -> ChaCha8Rng {
        let mut numbers = ChaCha8Rng::seed_from_u64(self.seed);
        let side = match side {
            SharedSide::A => 0,
            SharedSide::B => 1,
        };
        numbers.set_stream(2 * expert as u64 + side);
        numbers
    }
}

impl PerExpertLora {
    /// Number of routed experts.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// `[experts, rank, in]`; the first extent is 1 if all experts share it.
    pub fn a(&self) -> &HostTensor {
        &self.a
    }

    /// `[experts, out, rank]`; the first extent is 1 if all experts share it.
    pub fn b(&self) -> &HostTensor {
        &self.b
    }

    /// The weight update of one expert, `scale * B A`, as `[out, in]` in row-major order. Straightforward
    /// loops, which add in f32 along the rank. `None` if there is no such expert.
    pub fn delta(&self, expert: usize, scale: f32) -> Option<Vec<f32>> {
        if expert >= self.num_experts {
            return None;
        }
        let (a, rank, input) = matrix(&self.a, expert)?;
        let (b, output, _) = matrix(&self.b, expert)?;
        let mut delta = Vec::with_capacity(output * input);
        for b_row in b.chunks_exact(rank) {
            for column in 0..input {
                let mut sum = 0.0;
                for (k, factor) in b_row.iter().enumerate() {
                    sum += factor * a[k * input + column];
                }
                delta.push(scale * sum);
            }
        }
        Some(delta)
    }

    /// The pair as the update of a site.
    pub fn into_low_rank(self, scale: f32) -> LowRank {
        let rank = self.b.shape().last().copied().unwrap_or(0);
        let (a, b) = (self.a, self.b);
        LowRank { rank, scale, a, b, magnitude: None, b_bias: None, rows: RowOrder::ByPart }
    }
}

/// Elements, rows and columns of one expert's matrix.
fn matrix(stack: &HostTensor, expert: usize) -> Option<(Vec<f32>, usize, usize)> {
    let [experts, rows, columns] = *stack.shape() else { return None };
    let index = if experts == 1 { 0 } else { expert };
    let size = rows * columns;
    let values = (index * size..(index + 1) * size).map(|i| stack.get_f32(i)).collect();
    Some((values, rows, columns))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> PerExpertRecipe {
        PerExpertRecipe {
            num_experts: 3,
            rank: 2,
            in_dim: 5,
            out_dim: 4,
            dtype: DType::F32,
            seed: 7,
            shared_side: None,
        }
    }

    #[test]
    fn a_seed_gives_these_numbers() {
        let lora = recipe().make().unwrap();
        let (a, b) = (lora.a().to_f32(), lora.b().to_f32());
        assert_eq!(a[..3], [-0.775_371_9, -1.383_421_8, 0.889_713]);
        // The second expert's first row.
        assert_eq!(a[10..12], [-1.172_993_3, -0.154_800_9]);
        assert_eq!(b[..3], [1.026_385_7, -1.812_639, 0.828_860_16]);
    }

    #[test]
    fn experts_differ_and_do_not_depend_on_their_number() {
        let three = recipe().make().unwrap();
        let five = PerExpertRecipe { num_experts: 5, ..recipe() }.make().unwrap();
        assert_eq!(five.a().to_f32()[..30], three.a().to_f32());
        let deltas: Vec<_> = (0..5).map(|expert| five.delta(expert, 1.0).unwrap()).collect();
        for (i, delta) in deltas.iter().enumerate() {
            assert!(!deltas[..i].contains(delta));
        }
        let other = PerExpertRecipe { seed: 8, ..recipe() }.make().unwrap();
        assert_ne!(other.a(), three.a());
        assert_eq!((five.delta(5, 1.0), five.num_experts()), (None, 5));
    }

    #[test]
    fn numbers_are_standard_normal_in_every_dtype() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let lora = make_per_expert_lora(4, 16, 256, 256, dtype, 1).unwrap();
            let values = [lora.a().to_f32(), lora.b().to_f32()].concat();
            let mean = |power: i32| {
                values.iter().map(|v| f64::from(*v).powi(power)).sum::<f64>() / values.len() as f64
            };
            // Expected are 0, 1 and 3, with errors of about 0.006, 0.008 and 0.05.
            assert!(mean(1).abs() < 0.03, "{dtype}: {}", mean(1));
            assert!((mean(2) - 1.0).abs() < 0.04, "{dtype}: {}", mean(2));
            assert!((mean(4) - 3.0).abs() < 0.25, "{dtype}: {}", mean(4));
        }
    }

    #[test]
    fn a_shared_side_is_stored_once_and_used_by_all_experts() {
        let own = recipe().make().unwrap();
        let share = |side| PerExpertRecipe { shared_side: Some(side), ..recipe() }.make().unwrap();
        let (a, b) = (share(SharedSide::A), share(SharedSide::B));
        assert_eq!((a.a().shape(), a.b().shape()), (&[1, 2, 5][..], &[3, 4, 2][..]));
        assert_eq!((b.a().shape(), b.b().shape()), (&[3, 2, 5][..], &[1, 4, 2][..]));
        assert_eq!((a.b(), b.a()), (own.b(), own.a()));
        assert_eq!(a.a().to_f32(), own.a().to_f32()[..10]);
        assert_eq!(a.delta(0, 1.0), own.delta(0, 1.0));
        assert!(a.delta(2, 1.0).is_some() && a.delta(3, 1.0).is_none());
    }

    #[test]
    fn a_delta_is_the_scaled_product_of_the_experts_own_matrices() {
        let lora = recipe().make().unwrap();
        let (a, b) = (lora.a().to_f32(), lora.b().to_f32());
        let delta = lora.delta(1, 0.5).unwrap();
        assert_eq!(delta.len(), 4 * 5);
        // Row 3, column 2 of expert 1.
        let (a, b) = (&a[10..20], &b[8..16]);
        let expected = 0.5 * (b[6] * a[2] + b[7] * a[7]);
        assert_eq!(delta[3 * 5 + 2], expected);
        let low = lora.clone().into_low_rank(0.5);
        assert_eq!((low.rank, low.scale, &low.b), (2, 0.5, lora.b()));
    }

    #[test]
    fn what_cannot_be_made_is_refused_by_name() {
        let zero = |change: fn(&mut PerExpertRecipe)| {
            let mut recipe = recipe();
            change(&mut recipe);
            recipe.make().unwrap_err().to_string()
        };
        assert!(zero(|r| r.num_experts = 0).starts_with("num_experts: found 0"));
        assert!(zero(|r| r.rank = 0).starts_with("rank: found 0"));
        assert!(zero(|r| r.in_dim = 0).starts_with("in_dim: found 0"));
        assert!(zero(|r| r.out_dim = 0).starts_with("out_dim: found 0"));
        assert!(zero(|r| r.dtype = DType::I32).starts_with("dtype: found int32"));
        assert!(zero(|r| r.in_dim = usize::MAX).starts_with("shape: found [3, 2, "));
        assert!(zero(|r| r.out_dim = usize::MAX / 64).starts_with("shape: found [3, "));
    }
}
