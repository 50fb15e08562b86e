//! `loramux convert` and `loramux diff` of NeMo archives.

use loramux::Exit;
use loramux_tests::adapter_path;

use super::convert::{convert, diff};
use super::support::{llama, loramux};

#[test]
fn nemo_archives_are_written_and_read_for_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let (nemo, back) = (dir.path().join("adapter.nemo"), dir.path().join("back"));
    let (source, llama) = (adapter_path("llama.qkv-tied"), llama());
    let to_nemo = convert(&source, &nemo, &["--to", "nemo", "--model", &llama]);
    assert_eq!(to_nemo.exit, Exit::Fine, "{}", to_nemo.stderr);
    assert!(to_nemo.stdout.contains("NeMo archive"), "{}", to_nemo.stdout);
    let flags = ["--to", "peft", "--model", &llama];
    assert_eq!(convert(&nemo, &back, &flags).exit, Exit::Fine);
    for other in [&nemo, &back, &adapter_path("llama.qkv-tied-nemo")] {
        let same = diff(&source, other, &["--tolerance", "0", "--model", &llama]);
        assert_eq!(same.exit, Exit::Fine, "{}", same.stdout);
    }
    let apart = diff(&source, &nemo, &[]);
    assert_eq!(apart.exit, Exit::Refused);
    assert!(apart.stdout.contains("--model"), "{}", apart.stdout);
    // Without the model, the parts cannot be compared with the fused module.
    let whole = convert(&nemo, &dir.path().join("whole"), &["--to", "peft"]);
    assert_eq!(whole.exit, Exit::Refused);
    assert!(whole.stderr.contains("--model") && !dir.path().join("whole").exists());
    let words = ["inspect", nemo.to_str().unwrap(), "--model", &llama];
    let inspected = loramux(&words, b"");
    assert_eq!(inspected.exit, Exit::Fine, "{}", inspected.stdout);
    assert!(inspected.stdout.contains("attn_q"), "{}", inspected.stdout);
}
