//! Rotary position embeddings (RoPE; Su et al., 2021) and the scalings that supported checkpoints use.

use std::f32::consts::PI;

/// Base frequency and scaling of RoPE.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeConfig {
    /// Base of the geometric series of frequencies.
    pub theta: f32,
    /// Scaling for longer contexts.
    pub scaling: RopeScaling,
}

/// Scaling of frequencies for contexts longer than those of pre-training.
#[derive(Clone, PartialEq, Debug)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by a factor (Chen et al., 2023).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Low frequencies divided by a factor, high ones kept, interpolated in between (Llama 3.1).
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Frequencies are low if their wavelength exceeds the pre-training length over this.
        low_freq_factor: f32,
        /// Frequencies are high if their wavelength is below the pre-training length over this.
        high_freq_factor: f32,
        /// Context length of pre-training, in tokens.
        original_max_positions: f32,
    },
    /// One divisor per frequency, as GGUF files store it (`rope_freqs.weight`).
    PerFrequency(Vec<f32>),
}

impl RopeConfig {
    /// Radians per position of each of a head's `head_dim / 2` rotary pairs.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                let frequency = self.theta.powf(-((2 * i) as f32) / head_dim as f32);
                self.scaling.apply(i, frequency)
            })
            .collect()
    }

    /// `[positions, head_dim]`: the cosines of each position's angles, then their sines.
    pub fn cos_sin_table(&self, positions: usize, head_dim: usize) -> Vec<f32> {
        let frequencies = self.frequencies(head_dim);
        let mut table = Vec::with_capacity(positions * head_dim);
        for position in 0..positions {
            let angles = frequencies.iter().map(|f| position as f32 * f);
            table.extend(angles.clone().map(f32::cos));
            table.extend(angles.map(f32::sin));
        }
        table
    }
}

impl RopeScaling {
    fn apply(&self, i: usize, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::PerFrequency(divisors) => frequency / divisors.get(i).copied().unwrap_or(1.0),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let turns = original_max_positions * frequency / (2.0 * PI);
                let ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let keep = ramp.clamp(0.0, 1.0);
                frequency * keep + frequency / factor * (1.0 - keep)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 8192.0,
    };

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let plain = RopeConfig { theta: 5e5, scaling: RopeScaling::None }.frequencies(128);
        let stretched = RopeConfig { theta: 5e5, scaling: LLAMA3 }.frequencies(128);
        assert_eq!(plain[0], stretched[0]);
        assert!((plain[63] / stretched[63] - 8.0).abs() < 1e-4);
        assert!(stretched.windows(2).all(|w| w[0] > w[1]));
    }

    #[test]
    fn position_zero_does_not_rotate() {
        let table = RopeConfig { theta: 1e4, scaling: RopeScaling::None }.cos_sin_table(2, 4);
        assert_eq!(table[..4], [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(table.len(), 8);
    }
}
