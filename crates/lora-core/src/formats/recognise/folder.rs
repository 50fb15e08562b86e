//! Recognises folders by the names in them.

use std::path::{Path, PathBuf};

use super::listing::{Listing, number_after};
use super::{FileKind, Found};
use crate::files;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: [&str; 4] = [
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.pth",
];
const CHECKPOINT: &str = "checkpoint-";

/// Maximum number of subfolders to look into.
const MAX_PROBES: usize = 256;

/// Maximum size of `refs/main`, which holds a commit hash.
const MAX_REF: u64 = 4096;

/// The kind of a folder that is not an adapter.
pub(super) fn recognise(dir: &Path) -> Option<(PathBuf, Found)> {
    let listing = Listing::of(dir)?;
    if let Some(placeholder) = placeholder(&listing) {
        return Some(placeholder);
    }
    // With weights under PEFT's name it is an adapter, whatever else it contains.
    if WEIGHTS.iter().any(|name| listing.has(name)) {
        return None;
    }
    if let Some(gguf) = gguf(&listing) {
        return Some(gguf);
    }
    let rules = [empty, hub_cache, mlx, run_folder, adapters_below, training_state, other_format];
    rules.iter().find_map(|rule| rule(&listing)).map(|found| (dir.to_owned(), found))
}

/// A git-lfs pointer or web page in place of a file of an adapter.
fn placeholder(listing: &Listing) -> Option<(PathBuf, Found)> {
    let names = [CONFIG].into_iter().chain(WEIGHTS).filter(|name| listing.has(name));
    names.map(|name| listing.dir.join(name)).find_map(|path| {
        let kind = FileKind::of_file(&path)?;
        let stands_in = matches!(kind, FileKind::GitLfsPointer | FileKind::WebPage);
        stands_in.then_some((path, Found::File(kind)))
    })
}

fn gguf(listing: &Listing) -> Option<(PathBuf, Found)> {
    let named = |name: &&String| name.to_ascii_lowercase().ends_with(".gguf");
    let paths = listing.files.iter().filter(named).map(|name| listing.dir.join(name));
    paths.take(MAX_PROBES).find_map(|path| {
        let kind = FileKind::of_file(&path)?;
        Some((path, Found::File(kind)))
    })
}

fn empty(listing: &Listing) -> Option<Found> {
    (listing.files.is_empty() && listing.folders.is_empty()).then_some(Found::Empty)
}

/// `models--owner--name` with `blobs`, `refs` and `snapshots`.
fn hub_cache(listing: &Listing) -> Option<Found> {
    let has = |name: &str| listing.folders.contains(name);
    if !(has("snapshots") && (has("blobs") || has("refs"))) {
        return None;
    }
    let snapshots = Listing::of(&listing.dir.join("snapshots"))?.folders;
    let main = files::read_text(&listing.dir.join("refs/main"), MAX_REF).unwrap_or_default();
    let only = snapshots.first().filter(|_| snapshots.len() == 1);
    let snapshot = snapshots.get(main.trim()).or(only);
    Some(Found::HubCache { snapshot: snapshot.map(|hash| format!("snapshots/{hash}")) })
}

fn mlx(listing: &Listing) -> Option<Found> {
    let named =
        |name: &String| name == "adapters.safetensors" || name.ends_with("_adapters.safetensors");
    listing.files.iter().any(named).then_some(Found::Mlx)
}

fn run_folder(listing: &Listing) -> Option<Found> {
    let number = |name: &String| number_after(name, CHECKPOINT);
    let mut checkpoints: Vec<(u64, &String)> =
        listing.folders.iter().filter_map(|name| Some((number(name)?, name))).collect();
    checkpoints.sort();
    let mut newest_first = checkpoints.iter().rev().take(MAX_PROBES).map(|(_, name)| *name);
    let newest = newest_first.clone().find(|name| is_adapter(listing, name));
    let newest = newest.or_else(|| newest_first.next())?;
    Some(Found::RunFolder { newest: newest.clone() })
}

fn adapters_below(listing: &Listing) -> Option<Found> {
    let folders = listing.folders.iter().take(MAX_PROBES);
    let folders: Vec<String> = folders.filter(|name| is_adapter(listing, name)).cloned().collect();
    (!folders.is_empty()).then_some(Found::AdaptersBelow { folders })
}

fn is_adapter(listing: &Listing, folder: &str) -> bool {
    listing.dir.join(folder).join(CONFIG).is_file()
}

/// Training states, which are not meant for serving.
fn training_state(listing: &Listing) -> Option<Found> {
    let Listing { files, folders, .. } = listing;
    if listing.has("zero_to_fp32.py") || Listing::numbered(folders, "global_step") {
        return Some(Found::DeepSpeed);
    }
    if listing.has("latest_checkpointed_iteration.txt") || Listing::numbered(folders, "iter_") {
        return Some(Found::Megatron);
    }
    let sharded = files.iter().any(|name| name.ends_with(".distcp"))
        || Listing::numbered(folders, "pytorch_model_fsdp_")
        || (folders.contains("weights") && folders.contains("context"));
    sharded.then_some(Found::Distributed)
}

/// Complete weights in another form than PEFT's.
fn other_format(listing: &Listing) -> Option<Found> {
    let torchtune = |name: &&String| {
        name.strip_suffix(".pt").is_some_and(|stem| number_after(stem, "adapter_").is_some())
    };
    if let Some(file) = listing.files.iter().find(torchtune) {
        return Some(Found::Torchtune { file: file.clone() });
    }
    if listing.has("pytorch_lora_weights.safetensors") {
        return Some(Found::Diffusers);
    }
    let named = |prefix: &str, extension: &str| {
        listing.files.iter().any(|name| name.starts_with(prefix) && name.ends_with(extension))
    };
    let weights = named("model", ".safetensors")
        || named("pytorch_model", ".bin")
        || named("consolidated", ".pth");
    if weights && !listing.has(CONFIG) {
        return Some(Found::Model);
    }
    let mut tensors = listing
        .files
        .iter()
        .filter(|name| name.ends_with(".safetensors") || name.ends_with(".bin"))
        .filter(|name| *name != "training_args.bin");
    match (tensors.next(), tensors.next()) {
        (Some(file), None) if listing.has(CONFIG) => Some(Found::OtherName { file: file.clone() }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of these files; a name that ends with a slash is a folder.
    fn found(names: &[&str]) -> Option<Found> {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            if name.ends_with('/') {
                std::fs::create_dir_all(path).unwrap()
            } else {
                std::fs::write(path, "x").unwrap()
            }
        }
        recognise(dir.path()).map(|(_, found)| found)
    }

    #[test]
    fn folders_of_trainers_are_told_apart() {
        let model = Some(Found::Model);
        let cases: [(&[&str], Option<Found>); 18] = [
            (&[], Some(Found::Empty)),
            (&["adapters.safetensors", CONFIG], Some(Found::Mlx)),
            (&["0000100_adapters.safetensors"], Some(Found::Mlx)),
            (&["global_step500/x.pt", "latest", CONFIG], Some(Found::DeepSpeed)),
            (&["zero_to_fp32.py", "pytorch_model.bin"], Some(Found::DeepSpeed)),
            (&["pytorch_model_fsdp_0/__0_0.distcp"], Some(Found::Distributed)),
            (&["__0_0.distcp", ".metadata"], Some(Found::Distributed)),
            (&["weights/", "context/"], Some(Found::Distributed)),
            (&["iter_0000100/", "latest_checkpointed_iteration.txt"], Some(Found::Megatron)),
            (&["adapter_0.pt"], Some(Found::Torchtune { file: "adapter_0.pt".into() })),
            (&["pytorch_lora_weights.safetensors"], Some(Found::Diffusers)),
            (&["config.json", "model-00001-of-00002.safetensors"], model.clone()),
            (&["params.json", "consolidated.00.pth"], model),
            (
                &[CONFIG, "lora.safetensors"],
                Some(Found::OtherName { file: "lora.safetensors".into() }),
            ),
            (&[CONFIG, "a.safetensors", "b.safetensors"], None),
            (&[CONFIG], None),
            (&["notes.txt"], None),
            (&[CONFIG, "adapter_model.bin", "checkpoint-1/", "global_step1/"], None),
        ];
        for (names, expected) in cases {
            assert_eq!(found(names), expected, "{names:?}");
        }
    }

    #[test]
    fn the_newest_checkpoint_is_that_with_the_largest_number() {
        let newest = |names: &[&str]| match found(names) {
            Some(Found::RunFolder { newest }) => newest,
            other => panic!("{other:?}"),
        };
        let names =
            ["checkpoint-900/adapter_config.json", "checkpoint-1000/adapter_config.json", "runs/"];
        assert_eq!(newest(&names), "checkpoint-1000");
        // The last name may have been truncated.
        let names = ["checkpoint-9/adapter_config.json", "checkpoint-10/optimizer.pt"];
        assert_eq!(newest(&names), "checkpoint-9");
        assert_eq!(newest(&["checkpoint-9/", "checkpoint-10/", "checkpoint-x/"]), "checkpoint-10");
    }

    #[test]
    fn adapters_one_level_below_are_named() {
        let below = |folders: &[&str]| {
            let folders = folders.iter().map(|name| (*name).to_owned()).collect();
            Some(Found::AdaptersBelow { folders })
        };
        let names = ["sft/adapter_config.json", "dpo/adapter_config.json", "logs/"];
        assert_eq!(found(&names), below(&["dpo", "sft"]));
        assert_eq!(found(&["epoch_0/adapter_config.json"]), below(&["epoch_0"]));
    }

    #[test]
    fn a_repository_in_the_hub_cache_names_its_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| std::fs::create_dir_all(dir.path().join(name)).unwrap();
        make("blobs");
        make("snapshots/aaa");
        let snapshot = || match recognise(dir.path()) {
            Some((_, Found::HubCache { snapshot })) => snapshot,
            other => panic!("{other:?}"),
        };
        assert_eq!(snapshot().unwrap(), "snapshots/aaa");
        make("snapshots/bbb");
        assert_eq!(snapshot(), None);
        make("refs");
        std::fs::write(dir.path().join("refs/main"), "bbb\n").unwrap();
        assert_eq!(snapshot().unwrap(), "snapshots/bbb");
        std::fs::write(dir.path().join("refs/main"), "../../elsewhere").unwrap();
        assert_eq!(snapshot(), None);
    }

    #[test]
    fn placeholders_of_files_are_named_by_their_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONFIG);
        std::fs::write(dir.path().join("adapter_model.safetensors"), "x").unwrap();
        let cases = [
            ("version https://git-lfs.github.com/spec/v1\n", FileKind::GitLfsPointer),
            ("<html>Sign in</html>", FileKind::WebPage),
        ];
        for (text, kind) in cases {
            std::fs::write(&path, text).unwrap();
            assert_eq!(recognise(dir.path()), Some((path.clone(), Found::File(kind))));
        }
    }

    #[test]
    fn a_folder_with_very_many_entries_is_looked_at_in_part() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..10_100 {
            std::fs::create_dir(dir.path().join(format!("checkpoint-{number}"))).unwrap();
        }
        assert_eq!(Listing::of(dir.path()).unwrap().folders.len(), 10_000);
        assert!(matches!(recognise(dir.path()), Some((_, Found::RunFolder { .. }))));
    }
}
