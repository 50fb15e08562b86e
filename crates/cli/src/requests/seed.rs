//! Seeds of requests that set none.

use loramux_engine::GenerateRequest;

/// Seeds stay below 2^53, so that every JSON parser reads them exactly.
const BELOW: u64 = 1 << 53;

/// Gives a request that samples at random a seed, unless it has one, and returns the seed; greedy requests stay as they
/// are.
pub(crate) fn seeded(mut request: GenerateRequest) -> (GenerateRequest, Option<u64>) {
    let sampling = &mut request.sampling;
    if sampling.is_greedy() {
        return (request, None);
    }
    let seed = *sampling.seed.get_or_insert_with(|| rand::random_range(0..BELOW));
    (request, Some(seed))
}
