//! Requests as JSON lines, in this program's own format or in OpenAI's batch format.

mod lines;
mod messages;
mod openai;
mod seed;

use lora_core::LoraRequest;
use loramux_engine::sampling::Object;
use loramux_engine::{GenerateRequest, Prompt, SamplingParams};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

pub use lines::{LineReader, MAX_LINE, Next, RawLine};
pub(crate) use seed::seeded;

use messages::{Messages, chat};
use openai::BatchLine;

/// Values for fields that a line leaves out, and the names that it may use.
#[derive(Clone, Default, Debug)]
pub struct Defaults {
    /// Name by which OpenAI requests select the base model.
    pub model: String,
    /// Adapters that lines may select by name.
    pub adapters: Vec<LoraRequest>,
    /// Adapter of lines that select none.
    pub lora: Option<LoraRequest>,
    /// Sampling parameters, overridden field by field.
    pub sampling: Map<String, Value>,
}

/// A parsed line. Every line gets an answer, so a malformed one carries an error in place of its request.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its number, from 1.
    pub number: u64,
    /// Its `id`, verbatim; null if it has none.
    pub id: Box<RawValue>,
    /// Name of the requested adapter.
    pub lora: Option<String>,
    /// Seed of a request that samples at random; `None` under greedy decoding.
    pub seed: Option<u64>,
    /// The request, or an error message without the line number.
    pub request: Result<GenerateRequest, String>,
}

/// The fields of a line in this program's own format.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    /// Already read by [`Identity`].
    #[serde(default, rename = "id")]
    _id: Option<Box<RawValue>>,
    prompt: Option<String>,
    input_ids: Option<Vec<u32>>,
    messages: Option<Messages>,
    #[serde(default, deserialize_with = "present")]
    lora: Named,
    lora_request: Option<Object<LoraRequest>>,
    max_tokens: Option<usize>,
    sampling: Option<Map<String, Value>>,
}

/// A field whose null differs from its absence.
#[derive(Default)]
enum Named {
    #[default]
    Absent,
    Null,
    Name(String),
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Named, D::Error> {
    Ok(Option::deserialize(deserializer)?.map_or(Named::Null, Named::Name))
}

/// The fields needed to answer a line even if the rest of it is malformed, and to tell its format.
#[derive(Default, Deserialize)]
struct Identity<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    custom_id: Option<&'a RawValue>,
    body: Option<&'a RawValue>,
    lora: Option<&'a RawValue>,
    lora_request: Option<&'a RawValue>,
}

impl Identity<'_> {
    fn is_openai(&self) -> bool {
        self.custom_id.is_some() || self.body.is_some()
    }

    fn id(&self) -> Box<RawValue> {
        self.id.or(self.custom_id).unwrap_or(RawValue::NULL).to_owned()
    }

    fn lora(&self) -> Option<String> {
        let name = self.lora.and_then(|name| serde_json::from_str(name.get()).ok());
        name.or_else(|| {
            let request: Value = serde_json::from_str(self.lora_request?.get()).ok()?;
            request["lora_name"].as_str().map(str::to_owned)
        })
    }
}

/// Finds an adapter by name.
///
/// # Errors
/// A message with the known names.
pub fn find_adapter<'a>(
    adapters: &'a [LoraRequest],
    name: &str,
) -> Result<&'a LoraRequest, String> {
    adapters.iter().find(|adapter| adapter.lora_name == name).ok_or_else(|| {
        let known = if adapters.is_empty() {
            "there are no adapters".to_owned()
        } else {
            format!("known: {}", names(adapters))
        };
        format!("adapter {name:?} is not known; {known}; add it with --adapter NAME=PATH")
    })
}

/// The names of the first few adapters.
fn names(adapters: &[LoraRequest]) -> String {
    const SHOWN: usize = 20;
    let names: Vec<&str> =
        adapters.iter().take(SHOWN).map(|adapter| adapter.lora_name.as_str()).collect();
    let more = adapters.len() - names.len();
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", names.join(", "))
}

impl Line {
    /// Parses a line.
    pub fn read(raw: &RawLine, defaults: &Defaults) -> Self {
        let line = |id, lora, request| Self { number: raw.number, id, lora, seed: None, request };
        let text = match text(raw) {
            Ok(text) => text,
            Err(problem) => return line(RawValue::NULL.to_owned(), None, Err(problem)),
        };
        let identity: Identity<'_> = serde_json::from_str(text).unwrap_or_default();
        let request = if identity.is_openai() {
            parse(text).and_then(|line: BatchLine| from_openai(line, defaults))
        } else {
            parse(text).and_then(|fields: Fields| fields.into_request(defaults))
        };
        match request.map(seeded) {
            Ok((request, seed)) => {
                let lora = request.lora.as_ref().map(|lora| lora.lora_name.clone());
                Self { seed, ..line(identity.id(), lora, Ok(request)) }
            }
            Err(problem) => line(identity.id(), identity.lora(), Err(problem)),
        }
    }
}

fn text(raw: &RawLine) -> Result<&str, String> {
    let Some(bytes) = &raw.bytes else {
        return Err(format!("it has more than {MAX_LINE} bytes; make the request shorter"));
    };
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        format!("is not UTF-8 from byte {at} on; save the file as UTF-8")
    })
}

fn parse<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, String> {
    serde_json::from_str(text).map(|Object(fields)| fields).map_err(|error| without_line(&error))
}

/// The message of a JSON error without its "line 1", which would be taken for a line of the file.
fn without_line(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    match message.strip_suffix(&place) {
        Some(bare) => format!("{bare}, at column {}", error.column()),
        None => message,
    }
}

impl Fields {
    fn into_request(self, defaults: &Defaults) -> Result<GenerateRequest, String> {
        let prompt = match (self.prompt, self.input_ids, self.messages) {
            (Some(text), None, None) => Prompt::Text(text),
            (None, Some(ids), None) => Prompt::Ids(ids),
            (None, None, Some(messages)) => Prompt::Chat(chat(messages)),
            _ => return Err("give exactly one of prompt, input_ids and messages".to_owned()),
        };
        let lora = match (self.lora, self.lora_request) {
            (Named::Name(_), Some(_)) => {
                return Err("give at most one of lora and lora_request".to_owned());
            }
            (Named::Name(name), None) => Some(find_adapter(&defaults.adapters, &name)?.clone()),
            (_, Some(Object(request))) => Some(own_adapter(request, &defaults.adapters)?),
            (Named::Null, None) => None,
            (Named::Absent, None) => defaults.lora.clone(),
        };
        let mut given = self.sampling.unwrap_or_default();
        if let Some(max_tokens) = self.max_tokens
            && given.insert("max_tokens".to_owned(), max_tokens.into()).is_some()
        {
            return Err("max_tokens is given beside sampling and in it; give it once".to_owned());
        }
        let sampling = sampling(&defaults.sampling, given)?;
        Ok(GenerateRequest { prompt, sampling, lora })
    }
}

/// Checks a line's `lora_request` against the adapters of the command line: the same name or id must mean
/// the same path.
///
/// # Errors
/// A message with the name or id that is already in use.
fn own_adapter(asked: LoraRequest, adapters: &[LoraRequest]) -> Result<LoraRequest, String> {
    let absolute = |of: &LoraRequest| of.lora_path.canonicalize().unwrap_or(of.lora_path.clone());
    for known in adapters {
        let what = if known.lora_name == asked.lora_name {
            format!("lora_name {:?}", asked.lora_name)
        } else if known.lora_int_id == asked.lora_int_id {
            format!("lora_int_id {}", asked.lora_int_id)
        } else {
            continue;
        };
        if absolute(known) != absolute(&asked) {
            let (known, asked) = (known.lora_path.display(), asked.lora_path.display());
            return Err(format!(
                "{what} is already used for {known} by the command line; it cannot also name {asked}: use \
                 another one"
            ));
        }
    }
    Ok(asked)
}

fn from_openai(line: BatchLine, defaults: &Defaults) -> Result<GenerateRequest, String> {
    let asked = line.read()?;
    let lora = match asked.model {
        None => defaults.lora.clone(),
        Some(model) => named(&model, defaults)?,
    };
    let sampling = sampling(&defaults.sampling, asked.sampling)?;
    Ok(GenerateRequest { prompt: asked.prompt, sampling, lora })
}

/// The adapter that OpenAI's `model` selects; `None` for the base model.
fn named(model: &str, defaults: &Defaults) -> Result<Option<LoraRequest>, String> {
    let adapter = defaults.adapters.iter().find(|adapter| adapter.lora_name == model);
    if let Some(adapter) = adapter {
        return Ok(Some(adapter.clone()));
    }
    if model == defaults.model || model.rsplit('/').next() == Some(&*defaults.model) {
        return Ok(None);
    }
    let known = if defaults.adapters.is_empty() {
        "there are none".to_owned()
    } else {
        names(&defaults.adapters)
    };
    Err(format!(
        "body.model is {model:?}, which is neither the base model ({:?}) nor an adapter ({known})",
        defaults.model
    ))
}

/// The sampling parameters `given`, with missing fields from `defaults`.
///
/// # Errors
/// A message with the first field that is unknown, has the wrong type, or requests something that JSON lines cannot
/// carry.
pub fn sampling(
    defaults: &Map<String, Value>,
    given: Map<String, Value>,
) -> Result<SamplingParams, String> {
    let mut fields = defaults.clone();
    fields.extend(given);
    let params: SamplingParams =
        serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
    for (field, asked) in [
        ("return_context_logits", params.return_context_logits),
        ("return_generation_logits", params.return_generation_logits),
    ] {
        if asked {
            return Err(format!(
                "sampling parameter `{field}` is true, but JSON lines carry no logits; leave it \
                 out, or use the library"
            ));
        }
    }
    Ok(params)
}

#[cfg(test)]
mod tests;
