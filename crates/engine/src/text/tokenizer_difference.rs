//! Comparing an adapter's tokenizer with the model's.

use serde::Serialize;

use super::Tokenizer;

/// A token and its id.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct NamedToken {
    /// Its spelling.
    pub token: String,
    /// Its id.
    pub id: u32,
}

/// A token of the model's vocabulary that the adapter's tokenizer lacks or has at another id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Contradiction {
    /// The model's token.
    pub model: NamedToken,
    /// The id of the same spelling in the adapter's tokenizer, if it has it.
    pub adapter: Option<u32>,
}

/// The differences of an adapter's tokenizer from the model's.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct TokenizerDifference {
    /// Tokens that the model's tokenizer lacks or has at another id; sorted by id.
    pub added: Vec<NamedToken>,
    /// Tokens of the model's vocabulary that the adapter's tokenizer lacks or has at another id; sorted by id.
    /// The model's added tokens are not compared, as trainers give their ids new spellings.
    pub contradicted: Vec<Contradiction>,
    /// Whether tokenizers with the same tokens encode or decode differently.
    pub rules: bool,
}

impl TokenizerDifference {
    /// Compares two tokenizers independently of the order and format of their JSON. A tokenizer built from a
    /// GGUF file is compared by its tokens only, as such a file lacks the rest.
    pub fn between(model: &Tokenizer, adapter: &Tokenizer) -> Self {
        let tokens = |tokenizer: &Tokenizer| tokenizer.inner().get_vocab(true);
        let (ours, theirs) = (tokens(model), tokens(adapter));
        let added = by_id(theirs.iter().filter(|(token, id)| ours.get(*token) != Some(*id)));
        let replaceable = model.inner().get_added_tokens_decoder();
        let kept = |token: &String, id: &u32| {
            theirs.get(token) == Some(id) || replaceable.contains_key(id) || is_filler(token, *id)
        };
        let lost = by_id(ours.iter().filter(|(token, id)| !kept(token, id)));
        let contradiction =
            |model: NamedToken| Contradiction { adapter: theirs.get(&model.token).copied(), model };
        let contradicted: Vec<_> = lost.into_iter().map(contradiction).collect();
        let comparable = added.is_empty() && contradicted.is_empty() && model.digest().is_some();
        let rules = comparable && meaning(model) != meaning(adapter);
        Self { added, contradicted, rules }
    }

    /// Whether there is no difference.
    pub fn is_none(&self) -> bool {
        self.added.is_empty() && self.contradicted.is_empty() && !self.rules
    }
}

fn by_id<'a>(tokens: impl Iterator<Item = (&'a String, &'a u32)>) -> Vec<NamedToken> {
    let mut tokens: Vec<_> =
        tokens.map(|(token, id)| NamedToken { token: token.clone(), id: *id }).collect();
    tokens.sort_by(|a, b| (a.id, &a.token).cmp(&(b.id, &b.token)));
    tokens
}

/// Whether a token is a placeholder that llama.cpp's converter writes for an unused id.
fn is_filler(token: &str, id: u32) -> bool {
    token.strip_prefix("[PAD").and_then(|rest| rest.strip_suffix(']')) == Some(&id.to_string())
}

/// Hash of the tokenizer's canonical JSON; `None` if the library cannot serialise it.
fn meaning(tokenizer: &Tokenizer) -> Option<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    serde_json::to_writer(&mut hasher, tokenizer.inner()).ok()?;
    Some(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::text::testkit::byte_tokenizer;

    fn saved() -> Value {
        serde_json::from_str(&byte_tokenizer().inner().to_string(false).unwrap()).unwrap()
    }

    fn tokenizer(json: &Value) -> Tokenizer {
        Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
    }

    fn difference(change: impl FnOnce(&mut Value)) -> TokenizerDifference {
        let mut json = saved();
        change(&mut json);
        TokenizerDifference::between(&tokenizer(&saved()), &tokenizer(&json))
    }

    fn add(json: &mut Value, token: &str, id: u32) {
        let token = json!({"id": id, "content": token, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false});
        json["added_tokens"].as_array_mut().unwrap().push(token);
    }

    #[test]
    fn another_form_of_the_same_tokenizer_is_no_difference() {
        let other_form = |json: &mut Value| {
            let merges = json["model"]["merges"].as_array_mut().unwrap();
            for merge in merges {
                *merge =
                    json!(format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()));
            }
            json["truncation"] = json!({"direction": "Right", "max_length": 8,
                "strategy": "LongestFirst", "stride": 0});
            json["model"].as_object_mut().unwrap().remove("ignore_merges");
        };
        assert!(difference(other_form).is_none());
        assert!(difference(|_| ()).is_none());
    }

    #[test]
    fn other_rules_with_the_same_tokens_are_a_difference() {
        let told = difference(|json| json["pre_tokenizer"]["add_prefix_space"] = json!(true));
        assert_eq!(told, TokenizerDifference { rules: true, ..Default::default() });
        let told = difference(|json| drop(json["model"]["merges"].as_array_mut().unwrap().pop()));
        assert!(told.rules);
    }

    #[test]
    fn added_and_renamed_tokens_are_a_difference() {
        let told = difference(|json| add(json, "<new>", 263));
        assert_eq!(told.added, [NamedToken { token: "<new>".to_owned(), id: 263 }]);
        assert!(told.contradicted.is_empty());
        let renamed = |json: &mut Value| *json = rename(json, "</s>", "<|im_end|>");
        let told = difference(renamed);
        assert_eq!(told.added, [NamedToken { token: "<|im_end|>".to_owned(), id: 2 }]);
        assert!(told.contradicted.is_empty(), "the model's own special tokens may be renamed");
    }

    fn rename(json: &Value, from: &str, to: &str) -> Value {
        serde_json::from_str(&json.to_string().replace(from, to)).unwrap()
    }

    #[test]
    fn another_vocabulary_is_a_difference() {
        let told = difference(|json| *json = rename(json, "\"z\"", "\"zz\""));
        let lost = |c: &Contradiction| (c.model.token.clone(), c.adapter);
        assert_eq!(told.contradicted.iter().map(lost).collect::<Vec<_>>(), [("z".into(), None)]);
    }

    #[test]
    fn a_gguf_vocabulary_is_compared_by_its_tokens() {
        let mut json = saved();
        json["pre_tokenizer"]["add_prefix_space"] = json!(true);
        let told = TokenizerDifference::between(&byte_tokenizer(), &tokenizer(&json));
        assert!(told.is_none());
        assert!(is_filler("[PAD7]", 7) && !is_filler("[PAD7]", 8) && !is_filler("[PAD]", 7));
    }
}
