//! PEFT directories: `adapter_model.safetensors` beside `adapter_config.json`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;
use safetensors::tensor::serialize_to_file;
use serde_json::Value;

use super::config::{config, is_saved};
use super::contents::{Contents, SiteUpdate, Target};
use super::names::Names;
use super::stack::LazyTensor;
use super::{WriteError, check, experts, inexpressible, io_error};
use crate::adapter::{Adapter, LowRank, RowOrder, SiteWeights};
use crate::config::ExpertLayout;
use crate::device::HostTensor;
use crate::modules::{SiteKey, TargetModule};

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// Writes the adapter into the directory `dir` as PEFT 0.21.2 does, with routed experts in `layout`.
///
/// Reading it again gives the same sites, ranks and scales, bit for bit, except that some layouts change
/// the form of routed experts, though not their products: a matrix that all experts share is repeated
/// for each (except in [`ExpertLayout::SharedOuter`]), and if gate and up are one module, they become one
/// update, with stacked ranks if their A differ. Modules are named as in the file that the adapter was
/// read from; parts of a fused module are written separately.
///
/// # Errors
/// A directory that is not empty; an adapter that PEFT or the layout cannot represent; errors of the file
/// system. No files are left behind.
pub fn peft(dir: &Path, adapter: &Adapter, layout: ExpertLayout) -> Result<(), WriteError> {
    check::consistent(adapter)?;
    let names = Names::of(adapter)?;
    let mut contents = Contents::default();
    for (key, site) in &adapter.sites {
        if !key.module().is_some_and(TargetModule::is_routed_expert) {
            add_dense(*key, site, &names, &mut contents)?;
        } else if site.replacement.is_some() || site.base_bias.is_some() {
            return Err(whole_expert(*key));
        }
    }
    experts::add(adapter, layout, &names, &mut contents)?;
    let config = config(adapter, layout, &names, &contents)?;
    Directory::create(dir)?.write(contents.tensors, &config)
}

/// Adds all tensors of a dense site.
fn add_dense(
    key: SiteKey,
    site: &SiteWeights,
    names: &Names,
    contents: &mut Contents,
) -> Result<(), WriteError> {
    let module = names.module(key);
    if let Some(low) = &site.low_rank {
        add_low_rank(key, low, &module, contents)?;
        let (layer, path) = match key {
            SiteKey::Layer(layer, kind) => (Some(layer.0), names.path(kind).to_owned()),
            _ => (None, module.clone()),
        };
        contents.targets.push(Target { layer, path });
    }
    // In a module that PEFT wraps, the model's own layer is `base_layer`.
    let wrapped = site.low_rank.is_some();
    if let Some(bias) = &site.base_bias {
        let kind = if wrapped { "base_layer.bias" } else { "bias" };
        contents.add(&module, kind, LazyTensor::whole(bias));
    }
    if let Some(weight) = &site.replacement {
        let kind = if is_saved(site) { "weight" } else { "base_layer.weight" };
        contents.add(&module, kind, LazyTensor::whole(weight));
    }
    if let Some(rows) = &site.rows {
        contents.add(
            &module,
            "token_adapter.trainable_tokens_delta",
            LazyTensor::whole(&rows.values),
        );
    }
    Ok(())
}

fn add_low_rank(
    key: SiteKey,
    low: &LowRank,
    module: &str,
    contents: &mut Contents,
) -> Result<(), WriteError> {
    if low.rows == RowOrder::ByKvHead {
        return Err(inexpressible(
            &key,
            "rows of query, key and value in turn, for each KV head",
            "all query rows, then all key rows, then all value rows",
            "read the adapter for its model, which cuts them apart (--model)",
        ));
    }
    let mut add =
        |kind: &str, tensor: &HostTensor| contents.add(module, kind, LazyTensor::whole(tensor));
    let [a, b] = match key {
        SiteKey::Embed => ["lora_embedding_A", "lora_embedding_B"],
        _ => ["lora_A.weight", "lora_B.weight"],
    };
    add(a, &low.a);
    add(b, &low.b);
    if let Some(magnitude) = &low.magnitude {
        add("lora_magnitude_vector", magnitude);
    }
    if let Some(bias) = &low.b_bias {
        add("lora_B.bias", bias);
    }
    let key = fancy_regex::escape(module).into_owned();
    contents.updates.push(SiteUpdate { key, rank: low.rank, scale: low.scale });
    Ok(())
}

fn whole_expert(key: SiteKey) -> WriteError {
    inexpressible(
        &key,
        "a whole weight or bias in place of the model's",
        "whole weights and biases of dense modules",
        "train the module through LoRA",
    )
}

/// A directory that is being written. Unless it is finished, its files are removed on drop.
struct Directory {
    dir: PathBuf,
    /// Whether the writer created the directory.
    made: bool,
    /// Files with temporary names, which no reader looks for.
    unfinished: Vec<PathBuf>,
}

impl Directory {
    fn create(dir: &Path) -> Result<Self, WriteError> {
        let failed = |error| io_error(dir, error);
        let made = match fs::read_dir(dir) {
            Ok(mut entries) => match entries.next() {
                Some(_) => return Err(WriteError::Exists { path: dir.to_owned() }),
                None => false,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(dir).map_err(failed)?;
                true
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { dir: dir.to_owned(), made, unfinished: Vec::new() })
    }

    fn write(
        mut self,
        tensors: Vec<(String, LazyTensor)>,
        config: &Value,
    ) -> Result<(), WriteError> {
        let path = self.unfinished(CONFIG);
        let text = format!("{config:#}\n");
        fs::write(&path, text).map_err(|error| io_error(&path, error))?;
        let permissions =
            fs::metadata(&path).map_err(|error| io_error(&path, error))?.permissions();
        let path = self.unfinished(WEIGHTS);
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        serialize_to_file(tensors, Some(metadata), &path)
            .map_err(|error| io_error(&path, as_io(error)))?;
        // Temporary files are created with permissions for the owner only.
        fs::set_permissions(&path, permissions).map_err(|error| io_error(&path, error))?;
        // The configuration is renamed last: without it, the directory is not an adapter.
        for name in [WEIGHTS, CONFIG] {
            let path = self.dir.join(name);
            fs::rename(unfinished(&path), &path).map_err(|error| io_error(&path, error))?;
            self.unfinished.push(path);
        }
        self.unfinished.clear();
        self.made = false;
        Ok(())
    }

    /// The temporary name of a file.
    fn unfinished(&mut self, name: &str) -> PathBuf {
        let path = unfinished(&self.dir.join(name));
        self.unfinished.push(path.clone());
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The original error matters more than one of the clean-up.
        for path in &self.unfinished {
            let _ = fs::remove_file(path);
        }
        if self.made {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

fn unfinished(path: &Path) -> PathBuf {
    path.with_added_extension("partial")
}

fn as_io(error: SafeTensorError) -> io::Error {
    match error {
        SafeTensorError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
