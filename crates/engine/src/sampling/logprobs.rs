//! Log-probabilities of tokens.

/// One token's log-probability.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Rank by probability; 1 is the most probable token.
    pub rank: u32,
}

/// Log-probabilities at one position.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenLogprobs {
    /// The token at the position.
    pub token: TokenLogprob,
    /// The most probable tokens, in descending order.
    pub top: Vec<TokenLogprob>,
}
