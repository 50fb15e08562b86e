//! Breaks every rule once through the public API. The messages are snapshots in `tests/tests/snapshots`.
//! Every code must have a case here.

#![allow(clippy::unwrap_used, reason = "a case that cannot be set up is a failed test")]

mod cases_config;
mod cases_file;
mod cases_model;
mod cases_moe;
mod cases_text;
mod draft;

use lora_core::{Code, Rejection, Rejections};

/// A code, and something that is refused with only this code.
type Case = (Code, fn() -> Vec<Rejection>);

fn cases() -> impl Iterator<Item = &'static Case> {
    let tables = [
        cases_config::CASES,
        cases_file::CASES,
        cases_model::CASES,
        cases_moe::CASES,
        cases_text::CASES,
    ];
    tables.into_iter().flatten()
}

#[test]
fn each_code_has_one_case() {
    for code in Code::all() {
        let count = cases().filter(|(of, _)| *of == code).count();
        assert_eq!(count, 1, "cases of `{code}` in tests/tests/rejections");
    }
}

#[test]
fn each_rule_refuses_in_the_words_of_its_snapshot() {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    let _settings = settings.bind_to_scope();
    for (code, provoke) in cases() {
        let rejections = Rejections(provoke());
        assert!(rejections.has(*code), "`{code}` is missing in:\n{rejections}");
        let others = rejections.0.iter().filter(|rejection| rejection.code != *code).count();
        assert_eq!(others, 0, "`{code}` is not the only code:\n{rejections}");
        insta::assert_snapshot!(code.as_str(), rejections.to_string());
    }
}
