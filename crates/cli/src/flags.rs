//! Hints for errors of the libraries, which name settings and not flags.

/// Settings, and where the command line sets them.
const FLAGS: [(&str, &str); 11] = [
    ("kv_cache_config.max_tokens", "--kv-cache-tokens"),
    ("free_gpu_memory_fraction", "--free-gpu-memory-fraction"),
    ("max_batch_size", "--max-batch-size"),
    ("max_num_tokens", "--max-num-tokens"),
    ("max_seq_len", "--max-seq-len"),
    ("max_loras", "--max-loras"),
    ("max_cpu_loras", "max_cpu_loras in the file of --lora-config or --config"),
    ("max_lora_rank", "--max-lora-rank"),
    ("device_cache_percent", "peft_cache_config in the file of --config"),
    ("tensor_parallel_size", "--tensor-parallel-size"),
    ("quant_config", "--quant-algo, or in the file of --config"),
];

/// Adds a hint to `error` that lists the flags of the settings in its message.
pub(crate) fn with_flags(error: anyhow::Error) -> anyhow::Error {
    let message = format!("{error:#}");
    let named: Vec<String> = FLAGS
        .iter()
        .filter(|(setting, _)| names(&message, setting))
        .map(|(setting, flag)| format!("{setting} is set by {flag}"))
        .collect();
    if named.is_empty() {
        return error;
    }
    anyhow::anyhow!("{message}\nhint: {}", named.join(", "))
}

/// Whether `message` contains `setting` as a whole word.
fn names(message: &str, setting: &str) -> bool {
    let of_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    message.match_indices(setting).any(|(at, _)| {
        let (before, after) = (&message[..at], &message[at + setting.len()..]);
        !before.ends_with(|c| of_word(c) || c == '.') && !after.starts_with(of_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_in_a_message_get_hints() {
        let text = |error: &'static str| format!("{:#}", with_flags(anyhow::anyhow!(error)));
        let message = text("lower max_loras or kv_cache_config.max_tokens");
        assert!(message.contains("\nhint: kv_cache_config.max_tokens is set by --kv-cache-tokens"));
        assert!(message.contains("max_loras is set by --max-loras"), "{message}");
        assert_eq!(text("max_loras_of_all is absent"), "max_loras_of_all is absent");
        let other = "cuda_graph_config.max_batch_size is 0";
        assert_eq!(text(other), other);
    }
}
