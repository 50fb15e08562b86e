//! The members of a NeMo archive.

use tar::{Archive, Entry, EntryType};

use crate::formats::read::bounded::Bounded;
use crate::formats::{AdapterError, Source, SourceReader};

/// Maximum size of all headers: 512 bytes for each member, and long names.
const MAX_HEADERS: u64 = 16 << 20;

/// Maximum size of `model_config.yaml`.
const MAX_CONFIG: u64 = 1 << 20;

const WEIGHTS: &str = "model_weights.ckpt";
const CONFIG: &str = "model_config.yaml";

/// Tokenizer files, which NeMo adds to archives with a prefix.
const TOKENIZER_FILES: [&str; 10] = [
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.vocab",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "sentencepiece.bpe.model",
];

/// The members that make up an adapter.
#[derive(Debug)]
pub(super) struct Members {
    /// `model_weights.ckpt`.
    pub weights: Source,
    /// `model_config.yaml`, whose size is bounded.
    pub config: Source,
    /// Warnings about other members, which are ignored.
    pub warnings: Vec<String>,
}

/// Finds the members of a tar file; an unknown member is an error.
pub(super) fn members(tar: &Source) -> Result<Members, AdapterError> {
    let invalid =
        |problem: String| AdapterError::InvalidNemo { path: tar.path().to_owned(), problem };
    let unreadable =
        |error: std::io::Error| invalid(format!("it is not a tar file that can be read ({error})"));
    let (mut weights, mut config, mut warnings) = (None, None, Vec::new());
    let mut archive = Archive::new(Bounded::new(tar.reader(), MAX_HEADERS));
    for entry in archive.entries_with_seek().map_err(unreadable)? {
        let mut entry = entry.map_err(unreadable)?;
        let Some(name) = plain_file(&mut entry).map_err(invalid)? else { continue };
        let slot = match name.as_str() {
            WEIGHTS => &mut weights,
            CONFIG => &mut config,
            _ if is_tokenizer_file(&name) => {
                warnings.push(format!("{name}: the base model's tokenizer is used instead"));
                continue;
            }
            _ => return Err(invalid(unknown(&name))),
        };
        let start = entry.raw_file_position();
        let range = start.checked_add(entry.size()).map(|end| start..end);
        let member = range.and_then(|range| tar.slice(range));
        let member = member
            .ok_or_else(|| invalid(format!("it ends within its member {name}: copy it again")))?;
        if slot.replace(member).is_some() {
            return Err(invalid(format!("it has two members {name}")));
        }
    }
    let missing = |name: &str| AdapterError::Missing {
        path: tar.path().to_owned(),
        what: format!("the member {name}"),
    };
    let weights = weights.ok_or_else(|| missing(WEIGHTS))?;
    let config = config.ok_or_else(|| missing(CONFIG))?;
    if config.len() > MAX_CONFIG {
        let found = config.len();
        let problem = format!("{CONFIG} has {found} bytes, above the limit of {MAX_CONFIG}");
        return Err(invalid(problem));
    }
    Ok(Members { weights, config, warnings })
}

/// The name of a member, without a leading `./`; `None` for a folder. Links, devices and paths that lead out
/// of the archive are refused: nothing is unpacked here, but NeMo never writes them.
fn plain_file(entry: &mut Entry<'_, Bounded<SourceReader>>) -> Result<Option<String>, String> {
    let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    let kind = entry.header().entry_type();
    let outside = name.starts_with('/') || name.split('/').any(|part| part == "..");
    if outside {
        return Err(format!("its member {name:?} lies outside of it"));
    }
    if is_sparse(entry, kind)? {
        return Err(format!("its member {name:?} is stored with holes"));
    }
    let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    let name = parts.join("/");
    match kind {
        EntryType::Directory if name == "model_weights" => Err(unknown(&name)),
        EntryType::Directory => Ok(None),
        EntryType::Regular | EntryType::Continuous => Ok(Some(name)),
        EntryType::Link | EntryType::Symlink => Err(format!("its member {name:?} is a link")),
        _ => Err(format!(
            "its member {name:?} is of type {:?}, neither a file nor a folder",
            char::from(kind.as_byte())
        )),
    }
}

/// Whether a member is sparse, so that its data are not contiguous: in GNU's old format, or by keywords of an
/// extended header.
fn is_sparse(
    entry: &mut Entry<'_, Bounded<SourceReader>>,
    kind: EntryType,
) -> Result<bool, String> {
    let unreadable = |error: std::io::Error| format!("it has a damaged header ({error})");
    let mut sparse = kind == EntryType::GNUSparse;
    for extension in entry.pax_extensions().map_err(unreadable)?.into_iter().flatten() {
        sparse |= extension.map_err(unreadable)?.key_bytes().starts_with(b"GNU.sparse.");
    }
    Ok(sparse)
}

fn is_tokenizer_file(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    TOKENIZER_FILES.iter().any(|known| {
        last.strip_suffix(known).is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('_'))
    })
}

fn unknown(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or(name);
    if name.split('/').next() == Some("model_weights") {
        format!("it is a distributed checkpoint ({name}): convert it to one {WEIGHTS}")
    } else if last == WEIGHTS {
        format!("it is divided by tensor parallelism ({name}): merge it into one {WEIGHTS}")
    } else {
        format!("it has the member {name:?}, whose meaning is not known: remove it")
    }
}
