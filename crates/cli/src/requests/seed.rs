//! Seeds of requests that give none.

use loramux_engine::GenerateRequest;

/// Seeds below this are numbers that every reader of JSON keeps exactly.
const BELOW: u64 = 1 << 53;

/// The request with a fresh seed, if it draws tokens at random and gives none; and its seed, if it
/// draws at random.
pub(crate) fn seeded(mut request: GenerateRequest) -> (GenerateRequest, Option<u64>) {
    let sampling = &mut request.sampling;
    if sampling.is_greedy() {
        return (request, None);
    }
    let seed = *sampling.seed.get_or_insert_with(|| rand::random_range(0..BELOW));
    (request, Some(seed))
}
