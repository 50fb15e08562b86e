//! Chats to prompts by the model's own template.

use std::path::Path;

use minijinja::Environment;
use serde::{Deserialize, Serialize};

use super::{
    TextError, TokenizerConfig,
    template_env::{TemplateRefusal, environment, without_generation_tags},
};

/// Name under which the one template is kept; it appears in messages about its lines.
const NAME: &str = "chat_template";

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A model's chat template, compiled.
///
/// It runs as in transformers' `apply_chat_template`: blocks are trimmed (`trim_blocks`,
/// `lstrip_blocks`), strings, lists and dicts have Python's methods, `tojson` writes what
/// `json.dumps` does, and `raise_exception`, `strftime_now` (in UTC), loop controls and
/// `{% generation %}` are there. `tools` and `documents` are none.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// The variables of a template. A token that the model lacks is left undefined rather than none, so
/// that it prints as nothing.
#[derive(Serialize)]
struct Context<'a> {
    messages: &'a [ChatMessage],
    tools: Option<()>,
    documents: Option<()>,
    add_generation_prompt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    bos_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eos_token: Option<&'a str>,
}

impl ChatTemplate {
    /// The template of a model's folder, with its BOS and EOS; see [`TokenizerConfig`] for where
    /// they are looked for.
    ///
    /// # Errors
    /// [`TextError::ChatTemplateMissing`], [`TextError::ChatTemplateSyntax`], and those of
    /// [`TokenizerConfig::from_model_dir`].
    pub fn from_model_dir(dir: &Path) -> Result<Self, TextError> {
        let config = TokenizerConfig::from_model_dir(dir)?;
        let source = config
            .chat_template
            .ok_or_else(|| TextError::ChatTemplateMissing { dir: dir.to_path_buf() })?;
        Self::from_source(&source, config.bos_token.as_deref(), config.eos_token.as_deref())
    }

    /// A template from its source, as from the `tokenizer.chat_template` of a GGUF file. `bos` and
    /// `eos` are the spellings of those tokens.
    ///
    /// # Errors
    /// [`TextError::ChatTemplateSyntax`] with the line.
    pub fn from_source(
        source: &str,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Self, TextError> {
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| TextError::ChatTemplateSyntax { reason: error.to_string() })?;
        Ok(Self {
            environment,
            bos_token: bos.map(str::to_owned),
            eos_token: eos.map(str::to_owned),
        })
    }

    /// The prompt for `messages`; with `add_generation_prompt` it ends where the assistant is to
    /// speak. Special tokens are in the text: encode it with [`super::SpecialTokens::Skip`].
    ///
    /// # Errors
    /// [`TextError::NoMessages`], [`TextError::ChatTemplateRefused`] with the template's own words
    /// when it calls `raise_exception`, else [`TextError::ChatTemplateFailed`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        if messages.is_empty() {
            return Err(TextError::NoMessages);
        }
        let context = Context {
            messages,
            tools: None,
            documents: None,
            add_generation_prompt,
            bos_token: self.bos_token.as_deref(),
            eos_token: self.eos_token.as_deref(),
        };
        let template = self.environment.get_template(NAME);
        template.and_then(|template| template.render(context)).map_err(|e| render_error(&e))
    }
}

fn render_error(error: &minijinja::Error) -> TextError {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(refusal) = inner.downcast_ref::<TemplateRefusal>() {
            return TextError::ChatTemplateRefused { message: refusal.0.clone() };
        }
        cause = inner.source();
    }
    TextError::ChatTemplateFailed { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(turns: &[(&str, &str)]) -> Vec<ChatMessage> {
        let message = |(role, content): &(&str, &str)| ChatMessage {
            role: (*role).to_owned(),
            content: (*content).to_owned(),
        };
        turns.iter().map(message).collect()
    }

    fn render(source: &str, turns: &[(&str, &str)]) -> Result<String, TextError> {
        ChatTemplate::from_source(source, Some("<s>"), None)?.render(&chat(turns), true)
    }

    #[test]
    fn turns_tokens_and_the_generation_prompt_are_written() {
        let source = "{{ bos_token }}{{ eos_token }}\n{% for m in messages %}\n    \
            {% if m['role'] == 'user' %}\n[{{ m.content | trim }}]\n    {% endif %}\n\
            {% endfor %}\n{% if add_generation_prompt %}>{% endif %}";
        let turns = [("user", " a & <b> "), ("assistant", "c"), ("user", "d")];
        assert_eq!(render(source, &turns).unwrap(), "<s>\n[a & <b>]\n[d]\n>");
    }

    #[test]
    fn what_templates_written_for_python_use_works() {
        let turns = [("system", "x"), ("user", "a</t>\n b"), ("user", "c")];
        let cases = [
            ("{{ messages[1].content.split('</t>')[-1].lstrip('\\n').strip() }}", "b"),
            ("{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}", "uus"),
            ("{{ messages[0].get('tool_calls') is none }}", "True"),
            ("{{ tools is none }}{{ tools }}{{ date_string is defined }}", "TrueNoneFalse"),
            ("{{ messages[0] | tojson }}", r#"{"role": "system", "content": "x"}"#),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\
              {% endfor %}{{ ns.n }}",
                "3",
            ),
            (
                "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}\
              {% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
                "x",
            ),
            (
                "{%- for m in messages -%}{% generation %} {{ m.content[:1] }}\
              {%- endgeneration %}{% endfor %}",
                " x a c",
            ),
            ("{{ strftime_now('%Y') | length }}", "4"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source, &turns).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn a_refusal_gives_the_templates_own_words() {
        let source = "{% if messages[0].role != 'user' %}\
            {{ raise_exception('Roles must alternate') }}{% endif %}";
        let error = render(source, &[("tool", "x")]).unwrap_err();
        assert!(
            matches!(&error, TextError::ChatTemplateRefused { message }
                if message == "Roles must alternate"),
            "{error}"
        );
    }

    #[test]
    fn broken_templates_and_empty_chats_are_told_apart() {
        assert!(matches!(render("{{ x", &[]), Err(TextError::ChatTemplateSyntax { .. })));
        assert!(matches!(render("x", &[]), Err(TextError::NoMessages)));
        let failed = render("\n{{ messages[0].a.b }}", &[("user", "x")]).unwrap_err();
        assert!(failed.to_string().contains("chat_template:2"), "{failed}");
    }

    #[test]
    fn a_folder_without_a_template_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = ChatTemplate::from_model_dir(dir.path()).unwrap_err();
        assert!(matches!(error, TextError::ChatTemplateMissing { dir: d } if d == dir.path()));
    }

    #[test]
    fn unknown_fields_of_a_message_are_refused() {
        let json = r#"{"role": "user", "content": "x", "name": "y"}"#;
        assert!(serde_json::from_str::<ChatMessage>(json).is_err());
    }
}
