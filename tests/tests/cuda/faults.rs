//! Engines on a full device. These tests fill the device memory, so they run in a separate process with
//! `--ignored`, one at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use lora_core::Result;
use lora_cuda::Cuda;
use loramux_tests::faults;

/// Held by the test that uses the device.
static DEVICE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // A failed test has freed its memory, so a poisoned lock is fine.
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device() -> Result<Cuda> {
    Ok(Cuda::new(0)?)
}

/// Defines a test for each fault, exclusive within this process.
macro_rules! faults {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        #[ignore = "it fills the device; `--ignored` runs all such tests in a process of their own"]
        fn $name() {
            let _alone = alone();
            faults::$name(&device);
        })*
    };
}

faults!(
    a_full_device_refuses_engines_until_there_is_room,
    an_engine_in_any_room_answers_right_or_says_why,
    keys_and_values_without_room_are_refused,
    an_adapter_larger_than_its_tier_fails_alone,
    an_adapter_that_finds_the_device_full_fails_alone,
);
