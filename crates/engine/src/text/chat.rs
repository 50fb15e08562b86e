//! Rendering conversations to prompts by the model's chat template.

use std::path::Path;

use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use super::{
    TextError, TokenizerConfig, template_bounds,
    template_budget::{MAX_STEPS, OverLimit},
    template_code,
    template_env::{TemplateRefusal, environment, without_generation_tags},
};

/// Name of the template in the environment. Errors show it with the line number.
const NAME: &str = "chat_template";

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or another role that the template supports.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl ChatMessage {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// A message of the system.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// A compiled chat template.
///
/// It is rendered as by transformers' `apply_chat_template`: blocks are trimmed (`trim_blocks`,
/// `lstrip_blocks`), strings, lists and dicts have Python's methods, `tojson` prints as `json.dumps`, and
/// `raise_exception`, `strftime_now` (in UTC), loop controls and `{% generation %}` are supported. `tools`
/// and `documents` are none.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// The variables of a template. A special token that the model lacks is undefined rather than none, so that
/// it prints as an empty string.
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
    /// Reads the template of a model's folder, with its BOS and EOS tokens; see [`TokenizerConfig`] for the files.
    ///
    /// # Errors
    /// [`TextError::ChatTemplateMissing`], [`TextError::ChatTemplateSyntax`], and those of
    /// [`TokenizerConfig::from_model_dir`].
    pub fn from_model_dir(dir: &Path) -> Result<Self, TextError> {
        Self::from_config(&TokenizerConfig::from_model_dir(dir)?)?
            .ok_or_else(|| TextError::ChatTemplateMissing { dir: dir.to_path_buf() })
    }

    /// Compiles the template of a configuration, if it has one.
    ///
    /// # Errors
    /// [`TextError::ChatTemplateSyntax`].
    pub fn from_config(config: &TokenizerConfig) -> Result<Option<Self>, TextError> {
        let (bos, eos) = (config.bos_token.as_deref(), config.eos_token.as_deref());
        let source = config.chat_template.as_deref();
        source.map(|source| Self::from_source(source, bos, eos)).transpose()
    }

    /// Compiles a template. `bos` and `eos` are the spellings of those tokens.
    ///
    /// # Errors
    /// [`TextError::ChatTemplateSyntax`] with the line, also if it exceeds a limit of the compiler.
    pub fn from_source(
        source: &str,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Self, TextError> {
        let source = without_generation_tags(source);
        template_bounds::check(NAME, &source)?;
        let mut environment = environment();
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| TextError::ChatTemplateSyntax { reason: error.to_string() })?;
        Ok(Self {
            environment,
            bos_token: bos.map(str::to_owned),
            eos_token: eos.map(str::to_owned),
        })
    }

    /// Renders `messages` to a prompt. With `add_generation_prompt` it ends with the header of the assistant's
    /// answer. The text contains its special tokens, so encode it with [`super::SpecialTokens::Skip`].
    ///
    /// # Errors
    /// [`TextError::NoMessages`]; [`TextError::ChatTemplateRefused`] with the template's message if it calls
    /// `raise_exception`; [`TextError::ChatTemplateTooCostly`] at a limit; else
    /// [`TextError::ChatTemplateFailed`].
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
        template
            .and_then(|template| {
                let context = Value::from_serialize(&context);
                template_code::render(&self.environment, &template, context)
            })
            .map_err(|e| render_error(&e))
    }
}

fn render_error(error: &minijinja::Error) -> TextError {
    let too_costly = |did: String| TextError::ChatTemplateTooCostly {
        place: format!("{NAME}:{}", error.line().unwrap_or(1)),
        did,
    };
    if error.kind() == ErrorKind::OutOfFuel {
        return too_costly(format!("runs more than {MAX_STEPS} steps"));
    }
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(refusal) = inner.downcast_ref::<TemplateRefusal>() {
            return TextError::ChatTemplateRefused { message: refusal.0.clone() };
        }
        if let Some(limit) = inner.downcast_ref::<OverLimit>() {
            return too_costly(limit.to_string());
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
    fn turns_special_tokens_and_the_generation_prompt_are_rendered() {
        let source = "{{ bos_token }}{{ eos_token }}\n{% for m in messages %}\n    \
            {% if m['role'] == 'user' %}\n[{{ m.content | trim }}]\n    {% endif %}\n\
            {% endfor %}\n{% if add_generation_prompt %}>{% endif %}";
        let turns = [("user", " a & <b> "), ("assistant", "c"), ("user", "d")];
        assert_eq!(render(source, &turns).unwrap(), "<s>\n[a & <b>]\n[d]\n>");
    }

    #[test]
    fn python_methods_and_filters_work() {
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
    fn a_refusal_has_the_templates_message() {
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
    fn broken_templates_and_empty_chats_are_different_errors() {
        assert!(matches!(render("{{ x", &[]), Err(TextError::ChatTemplateSyntax { .. })));
        assert!(matches!(render("x", &[]), Err(TextError::NoMessages)));
        let failed = render("\n{{ messages[0].a.b }}", &[("user", "x")]).unwrap_err();
        assert!(failed.to_string().contains("chat_template:2"), "{failed}");
    }

    /// Asserts that a template is stopped quickly, at the limit that `part` names.
    fn assert_stopped(source: &str, part: &str) {
        let start = std::time::Instant::now();
        let short: String = source.chars().take(99).collect();
        let error = render(source, &[("user", "x")]).expect_err(&short);
        let told = matches!(&error, TextError::ChatTemplateTooCostly { place, did }
            if place.starts_with("chat_template:") && did.contains(part));
        assert!(told, "{short}: {error}");
        assert!(start.elapsed().as_secs() < 20, "{short}: {:?}", start.elapsed());
    }

    #[test]
    fn templates_are_stopped_at_limits_of_text_steps_and_depth() {
        let doubled = |op: &str, start: &str| {
            let doubling = format!("{{% set s = {op} %}}").repeat(45);
            format!("{{% set s = {start} %}}{doubling}{{{{ s | length }}}}")
        };
        let looped = |body: &str| {
            format!(
                "{{% set ns = namespace(s='ab', l=[1]) %}}{{% for i in range(100000) %}}\
                 {{% set ns.s = {body} %}}{{% endfor %}}"
            )
        };
        let long = "{% set a = 'ab' %}{% set s = a * 40000000 %}";
        let cases = [
            (doubled("s ~ s", "'ab'"), "bytes"),
            (doubled("s + s", "'ab'"), "bytes"),
            (doubled("s * 2", "'ab'"), "bytes"),
            (doubled("s + s", "[1]"), "elements"),
            (doubled("s * 2", "[1]"), "elements"),
            (doubled("[s, s]", "1"), "elements"),
            (doubled("{'a': s, 'b': s}", "1"), "elements"),
            (doubled("dict(a=s, b=s)", "1"), "elements"),
            (doubled("s.replace('a', 'aa')", "'a'"), "bytes"),
            (doubled("s | replace('a', 'aa')", "'a'"), "bytes"),
            (doubled("[s, s] | join('-')", "'ab'"), "bytes"),
            (doubled("'-'.join([s, s])", "'ab'"), "bytes"),
            (doubled("'%s%s' | format(s, s)", "'ab'"), "bytes"),
            (doubled("'{}{}'.format(s, s)", "'ab'"), "bytes"),
            (doubled("[s, s] | tojson", "'ab'"), "bytes"),
            (doubled("[s, s] | string", "'ab'"), "bytes"),
            (
                format!(
                    "{{% set s = 'a' %}}{}",
                    "{% set s %}{{ s }}{{ s }}{% endset %}".repeat(45)
                ),
                "bytes",
            ),
            (format!("{{% set s = 1 %}}{}", "{% set s = [s] %}".repeat(99)), "deep"),
            (looped("ns.s ~ ns.s"), "bytes"),
            (looped("ns.s * 1000000000"), "bytes"),
            (looped("ns"), "namespace"),
            (looped("[ns]"), "namespace"),
            (format!("{long}{long}{long}{long}"), "bytes"),
            (format!("{long}{{% for c in s %}}{{% endfor %}}"), "takes a string"),
            (format!("{long}{{{{ s | list | length }}}}"), "takes a string"),
            (format!("{long}{{{{ s.split('a') | length }}}}"), "bytes"),
            (format!("{long}{{% set l = [s, s[1:], s[2:]] %}}"), "bytes"),
            ("{{ '%1000000000d' | format(1) }}".to_owned(), "width"),
            ("{{ '{:>1000000000}'.format(1) }}".to_owned(), "width"),
            ("{{ 'a' | indent(1000000000, true) }}".to_owned(), "width"),
            ("{{ [1] | tojson(indent=1000000000) }}".to_owned(), "width"),
            ("{{ [1] | batch(1000000000) | list }}".to_owned(), "elements"),
            ("{{ [1] | slice(1000000000) | list }}".to_owned(), "elements"),
            (
                "{% for i in range(100000) %}{% for i in range(100000) %}{% endfor %}{% endfor %}"
                    .to_owned(),
                "steps",
            ),
            (
                format!(
                    "{{% set x %}}{{% for i in range(100000) %}}{}{{% endfor %}}{{% endset %}}",
                    "raw ".repeat(1000)
                ),
                "bytes",
            ),
        ];
        for (source, part) in cases {
            assert_stopped(&source, part);
        }
    }

    #[test]
    fn templates_are_stopped_at_the_limit_of_time() {
        let text = "{% set a = 'a' %}{% set s = a * 60000000 %}";
        let list = "{% set n = 1000000 %}{% set l = [1] * n %}";
        let forever = |setup: &str, body: &str| {
            format!("{setup}{{% for i in range(99999) %}}{{% set x = {body} %}}{{% endfor %}}")
        };
        for source in [forever(text, "s[50000000]"), forever(list, "l[-1]")] {
            assert_stopped(&source, "seconds");
        }
    }

    #[test]
    fn recursion_without_an_end_is_an_error() {
        for source in [
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('ab') }}",
            "{{ range(1000000000) | list }}",
            "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        ] {
            assert!(render(source, &[("user", "x")]).is_err(), "{source}");
        }
    }

    #[test]
    fn long_chats_stay_far_below_the_limits() {
        let source = "{% set ns = namespace(all='') %}{% for m in messages %}\
            {% set text = m.content.split('</think>')[-1].strip() %}\
            {% set ns.all = ns.all ~ m.role ~ text %}{{ messages[loop.index0:] | length }}\
            {% if m.role == 'user' %}{{ text | trim }}{% endif %}{% endfor %}";
        let turns = vec![("user", "some words of a message. ".repeat(40)); 500];
        let turns: Vec<(&str, &str)> = turns.iter().map(|(r, c)| (*r, c.as_str())).collect();
        assert!(render(source, &turns).unwrap().len() > 400_000);
    }

    #[test]
    fn control_flow_is_kept() {
        let source = "{% macro f(x, y='d') %}({{ x }}{{ y }}{{ caller() if caller }}){% endmacro %}\
            {% for m in messages if m.role != 'b' %}{{ loop.index }}{{ f(m.role) }}{% else %}no\
            {% endfor %}{% call f('c') %}in{% endcall %}{% block b %}B{{ 1 + 2 * 3 }}{% endblock %}\
            {% filter upper %}up{% endfilter %}{{ 'x' if false or (1 and 2) else 'y' }}\
            {%- for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}\
            {% set a, b = 1, 2.5 %}{{ a + b }}{{ [1] + [2] }}{{ 'q' * 3 }}{{ 2 ~ none }}";
        let expected = "1(ad)2(cd)(cdin)B7UPy1231 3.5[1, 2]qqq2none";
        let turns = [("a", "x"), ("b", "x"), ("c", "x")];
        let plain =
            environment().render_str(source, minijinja::context! { messages => chat(&turns) });
        assert_eq!(render(source, &turns).unwrap(), plain.unwrap(), "{expected}");
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
