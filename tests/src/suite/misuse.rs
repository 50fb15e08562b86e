//! Calls that ops must refuse.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lora_core::{Backend, Result};

use super::rig::{Placed, Rig};

/// Collects misuses of an op that were not refused properly.
pub struct Misuse<B: Backend> {
    /// The backend.
    pub rig: Rig<B>,
    faults: Vec<String>,
}

/// Runs `tries` and reports all misuses that were not refused properly.
///
/// # Panics
/// If there are any, or if an operand cannot be made.
pub fn refusals<B: Backend>(
    make: &dyn Fn() -> B,
    tries: impl FnOnce(&mut Misuse<B>) -> Result<()>,
) {
    let mut misuse = Misuse { rig: Rig::new(make()), faults: Vec::new() };
    if let Err(e) = tries(&mut misuse) {
        panic!("{} backend: {e}", B::NAME);
    }
    assert!(misuse.faults.is_empty(), "{} backend: {:#?}", B::NAME, misuse.faults);
}

impl<B: Backend> Misuse<B> {
    /// Makes a call that must be refused without changing `outs`. `what` describes the misuse.
    pub fn refused<const N: usize>(
        &mut self,
        what: &str,
        outs: &mut [Placed<B>; N],
        call: impl FnOnce(&mut Rig<B>, &mut [Placed<B>; N]) -> Result<()>,
    ) {
        let rig = &mut self.rig;
        match catch_unwind(AssertUnwindSafe(|| call(rig, outs))) {
            Err(_) => return self.faults.push(format!("{what}: panicked")),
            Ok(Ok(())) => self.faults.push(format!("{what}: accepted")),
            Ok(Err(_)) => {}
        }
        for (i, out) in outs.iter_mut().enumerate() {
            match out.is_untouched(&mut self.rig) {
                Ok(true) => continue,
                Ok(false) => self.faults.push(format!("{what}: output {i} was written")),
                Err(e) => self.faults.push(format!("{what}: {e}")),
            }
            // Restored, so that the next misuse is not blamed for this one.
            if let Err(e) = out.restore(&mut self.rig) {
                self.faults.push(format!("{what}: {e}"));
            }
        }
    }
}
