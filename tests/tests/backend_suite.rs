//! The provider suite for the CPU backend, in every dtype and at every level of vector instructions.

use lora_cpu_ref::CpuRef;
use lora_cpu_ref::inner::Level;
use loramux_tests::backend_suite;
use loramux_tests::suite::Types;

/// The CPU backend limited to the vector instructions of `level`.
fn capped(level: Level) -> CpuRef {
    CpuRef::new().at_most(level)
}

backend_suite!(best_f32, CpuRef::new(), Types::F32);
backend_suite!(best_bf16, CpuRef::new(), Types::BF16);
backend_suite!(best_f16, CpuRef::new(), Types::F16);
backend_suite!(best_wide, CpuRef::new(), Types::WIDE);
backend_suite!(best_mixed, CpuRef::new(), Types::MIXED);
backend_suite!(best_fp8_kv, CpuRef::new(), Types::FP8_KV);
backend_suite!(avx512_f32, capped(Level::Avx512), Types::F32);
backend_suite!(avx512_bf16, capped(Level::Avx512), Types::BF16);
backend_suite!(avx2_f32, capped(Level::Avx2), Types::F32);
backend_suite!(avx2_bf16, capped(Level::Avx2), Types::BF16);
backend_suite!(baseline_f32, capped(Level::Baseline), Types::F32);
backend_suite!(baseline_bf16, capped(Level::Baseline), Types::BF16);
