//! Helpers: run the program in-process, and make adapters with one defect.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use loramux::{Exit, Streams};
use loramux_tests::{adapter_path, model_path};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// Output and exit code of a run.
pub struct Outcome {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command line.
pub fn loramux(words: &[&str], stdin: &[u8]) -> Outcome {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut streams = Streams {
        stdin: Box::new(Cursor::new(stdin.to_vec())),
        stdout: &mut stdout,
        stdout_file: None,
        stderr: &mut stderr,
        live: false,
        quiet: false,
    };
    let words = ["loramux"].iter().chain(words).map(Into::into);
    let exit = loramux::run(words, &mut streams);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { exit, stdout: text(stdout), stderr: text(stderr) }
}

/// The path of the fixture model `llama`.
pub fn llama() -> String {
    model_path("llama").to_str().unwrap().to_owned()
}

/// The value of `--adapter` for a fixture.
pub fn adapter_flag(name: &str, fixture: &str) -> String {
    format!("--adapter={name}={}", adapter_path(fixture).display())
}

/// Answers lines with the fixture model `llama` in float32.
pub fn generate(flags: &[&str], lines: &[u8]) -> (Exit, Vec<Value>) {
    let model = llama();
    let mut words = vec!["generate", "--model", &model, "--requests", "-", "--dtype", "float32"];
    words.extend(flags);
    let outcome = loramux(&words, lines);
    for line in outcome.stderr.lines() {
        let expected = ["device: ", "memory: ", "sampling: ", "failed: ", "summary: "];
        assert!(expected.iter().any(|start| line.starts_with(start)), "{}", outcome.stderr);
    }
    let answer = |line: &str| serde_json::from_str(line).unwrap();
    (outcome.exit, outcome.stdout.lines().map(answer).collect())
}

/// One object a line.
pub fn json_lines(lines: &[Value]) -> Vec<u8> {
    lines.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect()
}

/// A tensor that can be changed.
pub struct RawTensor {
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A copy of the fixture adapter `llama.attn-r8` in `dir`, to be damaged. Its tensors are bf16.
pub struct Copy {
    dir: PathBuf,
}

impl Copy {
    pub fn new(dir: &Path, name: &str) -> Self {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        for file in [WEIGHTS, CONFIG] {
            std::fs::copy(adapter_path("llama.attn-r8").join(file), dir.join(file)).unwrap();
        }
        Self { dir }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.clone()
    }

    pub fn without_weights(self) -> Self {
        std::fs::remove_file(self.dir.join(WEIGHTS)).unwrap();
        self
    }

    pub fn truncated(self) -> Self {
        let path = self.dir.join(WEIGHTS);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        self
    }

    pub fn with_config(self, field: &str, value: Value) -> Self {
        let path = self.dir.join(CONFIG);
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        self
    }

    /// Changes every tensor whose name contains `part`.
    pub fn with_tensors(self, part: &str, change: impl Fn(&mut RawTensor)) -> Self {
        let path = self.dir.join(WEIGHTS);
        let file = std::fs::read(&path).unwrap();
        let mut tensors: BTreeMap<String, RawTensor> = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(&file).unwrap().tensors() {
            assert_eq!(view.dtype(), Dtype::BF16);
            let mut raw = RawTensor { shape: view.shape().into(), bytes: view.data().into() };
            if name.contains(part) {
                change(&mut raw);
            }
            tensors.insert(name, raw);
        }
        fn view(raw: &RawTensor) -> TensorView<'_> {
            TensorView::new(Dtype::BF16, raw.shape.clone(), &raw.bytes).unwrap()
        }
        let views: Vec<_> = tensors.iter().map(|(name, raw)| (name, view(raw))).collect();
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        self
    }
}
