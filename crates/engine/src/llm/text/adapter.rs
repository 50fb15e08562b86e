//! Tokenizer, chat template and end tokens of an adapter: the model's, except where the adapter's folder has
//! its own.

use std::path::Path;
use std::sync::Arc;

use lora_core::{AdapterTokenizer, Rejection, Rejections};
use thiserror::Error;

use super::changes::TextChanges;
use super::model::TextModel;
use super::rules;
use super::token_pool::TokenPool;
use super::tokens::Tokens;
use crate::text::{
    AdapterTextFiles, ChatTemplate, TextError, TokenizerConfig, TokenizerDifference,
};

/// Tokenizer, chat template and end tokens for the requests of an adapter.
pub struct AdapterText {
    /// What requests with the adapter use.
    pub text: TextModel,
    /// How that differs from the model's.
    pub changes: TextChanges,
}

/// Why the tokenizer, chat template or end tokens of an adapter's folder cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterTextError {
    /// A file cannot be read.
    #[error(
        "{0}; or set adapter_tokenizer: base to use the model's tokenizer, chat template and end tokens"
    )]
    File(#[from] TextError),
    /// They are incompatible with the model.
    #[error(transparent)]
    Rejected(#[from] Rejections),
}

impl AdapterText {
    /// Reads the adapter's folder. These replace the model's where they differ:
    ///
    /// - the chat template, which is rendered with the adapter's special tokens;
    /// - end tokens: `eos_token_id` of `generation_config.json`, else the model's; and `eos_token` of
    ///   `tokenizer_config.json` besides, if it is not that of the model's tokenizer;
    /// - `tokenizer.json`, if it tokenizes differently.
    ///
    /// # Errors
    /// [`AdapterTextError`] with all rules that are broken.
    pub fn read(
        dir: &Path,
        model: &TextModel,
        whose: AdapterTokenizer,
    ) -> Result<Self, AdapterTextError> {
        Self::read_sharing(dir, model, whose, &TokenPool::default())
    }

    /// As [`AdapterText::read`], sharing tokenizers with other adapters by `pool`.
    pub(in crate::llm) fn read_sharing(
        dir: &Path,
        model: &TextModel,
        whose: AdapterTokenizer,
        pool: &TokenPool,
    ) -> Result<Self, AdapterTextError> {
        let files = match whose {
            AdapterTokenizer::Base => AdapterTextFiles::default(),
            AdapterTokenizer::Auto | AdapterTokenizer::Adapter => AdapterTextFiles::read(dir)?,
        };
        let mut builder = AdapterTextBuilder {
            text: model.clone(),
            changes: TextChanges { unread: files.unread(), ..TextChanges::default() },
            problems: Vec::new(),
            model,
            files,
        };
        builder.take_tokenizer(whose, pool)?;
        builder.take_template()?;
        builder.take_end_tokens();
        Rejections(builder.problems).into_result()?;
        Ok(Self { text: builder.text, changes: builder.changes })
    }
}

/// An adapter's text while it is built.
struct AdapterTextBuilder<'a> {
    model: &'a TextModel,
    files: AdapterTextFiles,
    text: TextModel,
    changes: TextChanges,
    problems: Vec<Rejection>,
}

impl AdapterTextBuilder<'_> {
    fn take_tokenizer(
        &mut self,
        whose: AdapterTokenizer,
        pool: &TokenPool,
    ) -> Result<(), TextError> {
        let base = self.model.tokens.as_ref();
        let Some(bytes) = &self.files.tokenizer else {
            let known = |token: &str| base.and_then(|base| base.tokenizer.token_id(token));
            self.problems.extend(rules::added_tokens_alone(&self.files.added_tokens, known));
            return Ok(());
        };
        let own = self.tokens(bytes, pool)?;
        if base.is_some_and(|base| Arc::ptr_eq(base, &own)) {
            return Ok(());
        }
        let difference = match base {
            Some(base) => TokenizerDifference::between(&base.tokenizer, &own.tokenizer),
            None => TokenizerDifference::default(),
        };
        if whose == AdapterTokenizer::Auto {
            self.problems.extend(rules::other_vocabulary(&difference.contradicted));
        }
        let padding = self.files.config.pad_token.as_deref();
        self.problems.extend(rules::tokens_without_rows(
            &difference.added,
            padding,
            self.model.vocab,
        ));
        self.changes.tokenizer = true;
        self.changes.added_tokens = difference.added;
        self.text.tokens = Some(own);
        Ok(())
    }

    /// The adapter's tokenizer; the model's if both tokenize alike.
    fn tokens(&self, bytes: &[u8], pool: &TokenPool) -> Result<Arc<Tokens>, TextError> {
        let base = self.model.tokens.as_ref();
        let digest = blake3::hash(bytes);
        let same_file = |base: &&Arc<Tokens>| base.tokenizer.digest() == Some(digest);
        if let Some(known) = base.filter(same_file).cloned().or_else(|| pool.get(&digest)) {
            return Ok(known);
        }
        let tokenizer = self.files.parse_tokenizer(bytes)?;
        let same_meaning = |base: &&Arc<Tokens>| {
            TokenizerDifference::between(&base.tokenizer, &tokenizer).is_none()
        };
        let tokens = match base.filter(same_meaning) {
            Some(base) => base.clone(),
            None => Arc::new(tokenizer.into()),
        };
        pool.remember(digest, &tokens);
        Ok(tokens)
    }

    fn take_template(&mut self) -> Result<(), TextError> {
        let (own, base) = (&self.files.config, &self.model.config);
        let either = |own: &Option<String>, base: &Option<String>| own.clone().or(base.clone());
        let config = TokenizerConfig {
            bos_token: either(&own.bos_token, &base.bos_token),
            eos_token: either(&own.eos_token, &base.eos_token),
            pad_token: base.pad_token.clone(),
            chat_template: either(&own.chat_template, &base.chat_template),
        };
        if config == *base {
            return Ok(());
        }
        if config.chat_template != base.chat_template {
            self.changes.chat_template = Some(self.files.template_file());
        }
        for (name, own, base) in [
            ("bos_token", &config.bos_token, &base.bos_token),
            ("eos_token", &config.eos_token, &base.eos_token),
        ] {
            let written = own.as_ref().filter(|_| own != base && config.chat_template.is_some());
            self.changes.special_tokens.extend(written.map(|token| (name, token.clone())));
        }
        self.text.chat = ChatTemplate::from_config(&config)?;
        self.text.config = config;
        Ok(())
    }

    fn take_end_tokens(&mut self) {
        let listed = self.files.end_ids.as_ref();
        self.problems.extend(listed.and_then(|ids| rules::end_ids(ids, self.model.vocab)));
        let mut ids = listed.unwrap_or(&self.model.end_ids).clone();
        match self.end_token() {
            Ok(own) => ids.extend(own.filter(|id| !ids.contains(id))),
            Err(problem) => self.problems.push(problem),
        }
        if ids != self.model.end_ids {
            self.changes.end_tokens = Some(ids.clone());
            self.text.end_ids = ids;
        }
    }

    /// The `eos_token` of the adapter's tokenizer, if it differs from the model's.
    fn end_token(&self) -> Result<Option<u32>, Rejection> {
        let Some(token) = &self.files.config.eos_token else { return Ok(None) };
        let id = |text: &TextModel, token: &String| {
            text.tokens.as_ref().and_then(|tokens| tokens.tokenizer.token_id(token))
        };
        let of_model = self.model.config.eos_token.as_ref();
        let own = id(&self.text, token);
        if of_model == Some(token) && own == id(self.model, token) {
            return Ok(None);
        }
        let own = own.ok_or_else(|| rules::unknown_end_token(token))?;
        if own as usize >= self.model.vocab {
            return Err(rules::end_token_without_row(token, own, self.model.vocab));
        }
        Ok(Some(own).filter(|own| of_model.and_then(|token| id(self.model, token)) != Some(*own)))
    }
}
