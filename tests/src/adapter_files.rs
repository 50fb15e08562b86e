//! The files of a PEFT adapter in memory, for tests that change them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use crate::fixtures::adapter_path;

/// A tensor of a file.
#[derive(Clone, PartialEq, Debug)]
pub struct FileTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements, little-endian.
    pub data: Vec<u8>,
}

impl FileTensor {
    /// A bfloat16 tensor of these values.
    pub fn bf16(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let data = values.into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), data }
    }

    /// A float32 tensor of one value.
    pub fn filled(shape: &[usize], value: f32) -> Self {
        let data = value.to_le_bytes().repeat(shape.iter().product());
        Self { dtype: Dtype::F32, shape: shape.to_vec(), data }
    }
}

/// `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Clone, PartialEq, Debug)]
pub struct AdapterFiles {
    /// The configuration.
    pub config: Value,
    /// The tensors.
    pub tensors: BTreeMap<String, FileTensor>,
}

impl AdapterFiles {
    /// Reads a fixture adapter.
    ///
    /// # Panics
    /// If they cannot be read: the checkout is broken.
    pub fn open(adapter: &str) -> Self {
        Self::read(&adapter_path(adapter))
    }

    /// Reads a directory.
    ///
    /// # Panics
    /// If they cannot be read: the checkout is broken.
    pub fn read(dir: &Path) -> Self {
        let config = fs::read(dir.join("adapter_config.json")).unwrap();
        let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |view: &TensorView<'_>| FileTensor {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
        };
        let tensors = parsed.iter().map(|(name, view)| (name.to_owned(), tensor(&view))).collect();
        Self { config: serde_json::from_slice(&config).unwrap(), tensors }
    }

    /// Writes them into a directory.
    ///
    /// # Panics
    /// If the directory cannot be written, or a tensor does not fill its shape.
    pub fn write(&self, dir: &Path) {
        let views = self
            .tensors
            .iter()
            .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
        let weights = safetensors::serialize(views, None).unwrap();
        fs::write(dir.join("adapter_model.safetensors"), weights).unwrap();
        fs::write(dir.join("adapter_config.json"), self.config.to_string()).unwrap();
    }

    /// The same files with one tensor changed.
    ///
    /// # Panics
    /// If there is no such tensor.
    #[must_use]
    pub fn with(&self, name: &str, change: impl FnOnce(&mut FileTensor)) -> Self {
        let mut files = self.clone();
        change(files.tensors.get_mut(name).unwrap());
        files
    }

    /// The same files with some tensors renamed.
    #[must_use]
    pub fn renamed(&self, rename: impl Fn(&str) -> String) -> Self {
        let tensors = self.tensors.iter().map(|(name, t)| (rename(name), t.clone())).collect();
        Self { config: self.config.clone(), tensors }
    }
}
