//! Compiling guides to matchers.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use serde_json::{Value, json};

use super::error::reason;
use super::vocabulary::token_bytes;
use super::{GuideError, GuideMatcher, bounds};
use crate::sampling::Guide;
use crate::text::Tokenizer;

/// Limits of the time and memory that a guide may take, by llguidance's estimates: 20 ms for compiling its
/// regular expressions (`initial_lexer_fuel`, 50 per microsecond), about 15 ms for a mask
/// (`step_lexer_fuel`, 14 per microsecond; `step_max_items`, 20 per microsecond), and 100 MB for a matcher
/// (`max_lexer_states`, 1 to 2 kB each). The largest known schemas (FHIR) take half of the fuel and of
/// `max_grammar_size`. [`bounds`] limits what these do not cover.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 50_000,
    max_grammar_size: 400_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// Compiles guides for the vocabulary of a model.
pub struct GuideCompiler {
    factory: ParserFactory,
    vocab: usize,
}

impl GuideCompiler {
    /// A compiler for a model with `vocab` tokens, at least as many as the tokenizer has. This takes a while, so
    /// make it once per tokenizer.
    ///
    /// # Errors
    /// [`GuideError::Decoder`] or [`GuideError::Vocabulary`].
    pub fn new(tokenizer: &Tokenizer, vocab: usize) -> Result<Self, GuideError> {
        let refuse = |reason| GuideError::Vocabulary { reason };
        let mut words = token_bytes(tokenizer, vocab)?;
        // End tokens depend on the request. So llguidance gets an additional end token after all others: its
        // bit in a mask says that the text is complete.
        words.push(Vec::new());
        let end = u32::try_from(vocab).map_err(|_| refuse(format!("{vocab} tokens")))?;
        let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| refuse(reason(&e)))?;
        *factory.limits_mut() = LIMITS;
        factory.quiet();
        Ok(Self { factory, vocab })
    }

    /// Compiles a guide to a matcher in its initial state.
    ///
    /// # Errors
    /// [`GuideError::Refused`] with llguidance's message.
    pub fn compile(&self, guide: &Guide<'_>) -> Result<GuideMatcher, GuideError> {
        let refuse = |reason| GuideError::Refused { field: guide.field(), reason };
        let grammar = match guide {
            Guide::Json(Value::String(text)) => {
                let schema = serde_json::from_str(text).map_err(|e| refuse(e.to_string()))?;
                bounds::check_schema(&schema).map_err(refuse)?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Guide::Json(schema) => {
                bounds::check_schema(schema).map_err(refuse)?;
                TopLevelGrammar::from_json_schema((*schema).clone())
            }
            Guide::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Guide::Grammar(text) => {
                bounds::check_grammar(text).map_err(refuse)?;
                TopLevelGrammar::from_lark((*text).to_owned())
            }
            Guide::JsonObject => TopLevelGrammar::from_json_schema(json!({"type": "object"})),
        };
        let parser = self.factory.create_parser(grammar).map_err(|e| refuse(reason(&e)))?;
        Ok(GuideMatcher::new(parser, self.vocab))
    }
}

impl std::fmt::Debug for GuideCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuideCompiler").field("vocab", &self.vocab).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sampling::MAX_GUIDE_BYTES;
    use crate::text::testkit::byte_tokenizer;

    fn compiler() -> GuideCompiler {
        GuideCompiler::new(&byte_tokenizer(), 263).unwrap()
    }

    /// Whether the guide accepts `text`, token by token.
    fn has(guide: &Guide<'_>, text: &str) -> bool {
        let mut matcher = compiler().compile(guide).unwrap();
        for byte in text.bytes() {
            let token = byte_token(byte);
            let allowed = matcher.allowed().unwrap().words;
            if allowed[token as usize / 32] >> (token % 32) & 1 == 0 {
                return false;
            }
            matcher.push(token).unwrap();
        }
        matcher.allowed().unwrap().complete
    }

    fn byte_token(byte: u8) -> u32 {
        let spelled = if byte == b' ' { 'Ġ' } else { byte.into() };
        byte_tokenizer().token_id(&spelled.to_string()).unwrap()
    }

    #[test]
    fn each_kind_of_guide_accepts_its_texts_only() {
        let schema = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"], "additionalProperties": false});
        let text = json!(schema.to_string());
        for schema in [&schema, &text] {
            assert!(has(&Guide::Json(schema), "{\"a\": 2}"));
            assert!(!has(&Guide::Json(schema), "{\"a\": 3}") && !has(&Guide::Json(schema), "{}"));
        }
        let regex = Guide::Regex("[ab]+/c?");
        assert!(
            has(&regex, "ab/") && has(&regex, "a/c") && !has(&regex, "a") && !has(&regex, "xa/")
        );
        let lark = Guide::Grammar("start: \"(\" start \")\" | \"x\"");
        assert!(has(&lark, "((x))") && !has(&lark, "((x)"));
        assert!(has(&Guide::JsonObject, "{\"k\": [1, {}]}") && !has(&Guide::JsonObject, "[1]"));
    }

    #[test]
    fn internal_references_are_followed_and_external_ones_refused() {
        let inside = json!({"$defs": {"n": {"type": "integer"}},
            "type": "array", "items": {"$ref": "#/$defs/n"}});
        assert!(has(&Guide::Json(&inside), "[1, 2]") && !has(&Guide::Json(&inside), "[true]"));
        let outside = json!({"$ref": "https://example.com/schema.json"});
        assert!(compiler().compile(&Guide::Json(&outside)).is_err());
    }

    #[test]
    fn a_broken_guide_is_refused_with_its_field_and_the_reason() {
        let (unknown, kind) = (json!({"uniqueItems": true}), json!({"type": "dragon"}));
        let (no_json, never) = (json!("{"), json!({"type": "integer", "enum": ["a"]}));
        let many = json!({"items": {"type": "integer", "multipleOf": 4_294_967_291u64}});
        for (guide, named) in [
            (Guide::Json(&unknown), "uniqueItems"),
            (Guide::Json(&kind), "dragon"),
            (Guide::Json(&no_json), "EOF"),
            (Guide::Json(&never), "nsatisfiable"),
            (Guide::Json(&many), "`multipleOf`"),
            (Guide::Regex("(a"), "unclosed group"),
            (Guide::Regex("a(?=b)"), "look"),
            (Guide::Grammar("start: thing"), "thing"),
            (Guide::Grammar(""), "start"),
            (Guide::Grammar("start: /(/"), "unclosed group"),
        ] {
            let refused = compiler().compile(&guide);
            let error = refused.expect_err(named).to_string();
            assert!(error.contains(guide.field()) && error.contains(named), "{named}: {error}");
            assert!(!error.contains("backtrace") && !error.contains("panic"), "{error}");
        }
    }

    #[test]
    fn a_guide_that_is_too_large_is_refused_quickly() {
        let nested = |open: &str, inner: &str, close: &str, times: usize| {
            [&open.repeat(times), inner, &close.repeat(times)].concat()
        };
        let longest = MAX_GUIDE_BYTES / 16;
        let deep_schema = json!(nested("{\"items\":", "{}", "}", longest));
        let deep_regex = nested("(", "a", ")", longest);
        let deep_grammar = format!("start: {}", nested("(", "\"a\"", ")", longest));
        let repeats = "((((a{0,1000}){0,1000}b){0,1000}c){0,1000}d){0,1000}";
        let blow_up = format!("(a|b)*a{}", "(a|b)".repeat(2_000));
        let long_string = json!({"type": "string", "minLength": 1_000_000_000u64});
        let large_steps: Vec<Value> =
            (0..90).map(|i| json!({"multipleOf": 1009 * (i % 2 + 1), "minimum": i})).collect();
        let large_steps = json!({"type": "array", "prefixItems": large_steps});
        let long_array = json!({"type": "array", "minItems": 1_000_000_000u64});
        for guide in [
            Guide::Json(&deep_schema),
            Guide::Json(&long_string),
            Guide::Json(&long_array),
            Guide::Json(&large_steps),
            Guide::Regex(&deep_regex),
            Guide::Regex(repeats),
            Guide::Regex(&blow_up),
            Guide::Grammar(&deep_grammar),
        ] {
            let started = Instant::now();
            let outcome = compiler().compile(&guide);
            let took = started.elapsed();
            assert!(took < Duration::from_secs(20), "{} took {took:?}", guide.field());
            if let Ok(mut matcher) = outcome {
                let _ = matcher.allowed();
            }
        }
    }
}
