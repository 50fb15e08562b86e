//! The host side of a step's sampling inputs, before they are uploaded.

use lora_core::ops::SampleRow;

/// Parameters, histories, biases, bans and masks of all rows of a step's logits: flat arrays, into
/// which each [`SampleRow`] holds its ranges.
#[derive(Clone, Default, Debug)]
pub struct SampleInputs {
    /// One for each row of logits.
    pub rows: Vec<SampleRow>,
    /// See [`lora_core::ops::SampleArgs::history`].
    pub history: Vec<[i32; 2]>,
    /// See [`lora_core::ops::SampleArgs::banned`].
    pub banned: Vec<i32>,
    /// See [`lora_core::ops::SampleArgs::bias`].
    pub bias: Vec<[i32; 2]>,
    /// See [`lora_core::ops::SampleArgs::masks`].
    pub masks: Vec<i32>,
}

impl SampleInputs {
    /// Adds a row with its history, bias and banned tokens.
    pub fn push(
        &mut self,
        row: SampleRow,
        history: impl Iterator<Item = [i32; 2]>,
        bias: &[[i32; 2]],
        banned: &[i32],
    ) {
        let (history_from, banned_from) = (self.history.len(), self.banned.len());
        let bias_from = self.bias.len();
        self.bias.extend(bias);
        self.history.extend(history);
        self.banned.extend(banned);
        self.rows.push(SampleRow {
            history: [history_from as u32, (self.history.len() - history_from) as u32],
            banned: [banned_from as u32, banned.len() as u32],
            bias: [bias_from as u32, bias.len() as u32],
            ..row
        });
    }

    /// Adds a row that may sample only the tokens of `mask`. Bans are expected to be taken out of the
    /// mask already.
    pub fn push_masked(
        &mut self,
        row: SampleRow,
        history: impl Iterator<Item = [i32; 2]>,
        bias: &[[i32; 2]],
        mask: &[i32],
    ) {
        let mask_row = self.masks.len() / mask.len().max(1);
        self.masks.extend(mask);
        self.push(SampleRow { mask: mask_row as i32, ..row }, history, bias, &[]);
    }
}
