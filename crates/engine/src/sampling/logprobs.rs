//! Log-probabilities of tokens.

/// One token's log-probability.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 for the likeliest token.
    pub rank: u32,
}

/// Log-probabilities at one position.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenLogprobs {
    /// The token that stands there.
    pub token: TokenLogprob,
    /// The likeliest tokens, best first.
    pub top: Vec<TokenLogprob>,
}
