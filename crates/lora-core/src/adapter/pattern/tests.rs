use proptest::prelude::*;

use super::*;

fn full(pattern: &str) -> Result<Pattern, Rejection> {
    let pattern = pattern.to_owned();
    Pattern::full(&pattern, &mut Budget::shared_by("target_modules", [&pattern]))
}

fn suffix(key: &str) -> Result<Pattern, Rejection> {
    let key = key.to_owned();
    Pattern::suffix(&key, &mut Budget::shared_by("rank_pattern", [&key]))
}

fn code<T>(result: Result<T, Rejection>) -> Option<Code> {
    result.err().map(|problem| problem.code)
}

const NAMES: [&str; 4] = [
    "model.layers.11.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "lm_head",
    "layers.3.mlp.experts.7.up_proj",
];

/// Patterns, and which of the names Python 3.11's `re.fullmatch` matches.
#[rustfmt::skip]
const BY_PYTHON: &[(&str, [bool; 4])] = &[
    (r".*\.(q|v)_proj\Z", [true, false, false, false]),
    (r"^(?!.*visual).*(?:q_proj|v_proj).*", [true, false, false, false]),
    (r"^(model(?=\.).*\.(q_proj|v_proj))$", [true, false, false, false]),
    (r".*(?<=self_attn\.)q_proj", [true, false, false, false]),
    (r".*\.(?:q|v|gate|up|down)_proj(?<!gate_proj)(?<!up_proj)", [true, true, false, false]),
    (r".*(.)\1.*", [true, false, false, false]),
    (r".*(?P<p>t)(?P=p)n.*", [true, false, false, false]),
    (r"(?i)LM_HEAD", [false, false, true, false]),
    (r".*(?i:Q)_proj", [true, false, false, false]),
    (r"(?s)(?a).*", [true, true, true, true]),
    (r"\Amodel\.layers\.\d+\.\w+\.[a-z_]+\Z", [true, true, false, false]),
    (r"[^\W\d]+\.[]a-z[]+\..*", [true, true, false, false]),
    (r"l[k-n]_head", [false, false, true, false]),
    (r"[\w.]+", [true, true, true, true]),
    (r"[+--\w]+\.?.*", [true, true, true, true]),
    (r"[a&&z._l-q0-9h-v]+", [false, false, false, false]),
    (r".*\x71_proj", [true, false, false, false]),
    (r".*\u0071_proj", [true, false, false, false]),
    (r"lm\_head", [false, false, true, false]),
    (r"lm_(?#the)head", [false, false, true, false]),
    (r"\blm_head\b", [false, false, true, false]),
    (r".*\Bproj", [true, true, false, true]),
    (r".*?layers\.(?>1+)\..*", [true, false, false, false]),
    (r"model\.layers\.1{2}\..*", [true, false, false, false]),
    (r"model\.layers\.1{,2}\..*", [true, false, false, false]),
    (r"model\.layers\.1{1,}\..*", [true, false, false, false]),
    (r"lm_head{0}", [false, false, false, false]),
    (r"x{,0}lm_head", [false, false, true, false]),
    (r"lm_head|model", [false, false, true, false]),
    (r"(lm_head|model.*)$", [true, true, true, false]),
    (r"", [false, false, false, false]),
    (r".*\.(\d+)\..*\.(?!\1).*", [true, true, false, true]),
    (r"model(?:\.\w+)+", [true, true, false, false]),
    (r".*\.[qv]_proj|lm_.*", [true, false, true, false]),
    (r"lm_head*+d?", [false, false, true, false]),
    (r"[^.]+(?:\.[^.]+){3,4}", [true, true, false, false]),
    (r"\<?lm_head\>?", [false, false, true, false]),
    (r"l[^a-l]_h[\x61-\x65]ad", [false, false, true, false]),
    (r"lm_[h-]ead", [false, false, true, false]),
    (r"lm_[-h]ead", [false, false, true, false]),
    (r"(?u)lm_head", [false, false, true, false]),
    (r"[\s\S]*", [true, true, true, true]),
    (r"l\w{1,3}?_head", [false, false, true, false]),
    (r"lm_head{x}?", [false, false, false, false]),
];

#[test]
fn patterns_match_what_python_matches() {
    for (pattern, expected) in BY_PYTHON {
        let compiled = full(pattern).unwrap_or_else(|problem| panic!("{problem}"));
        assert_eq!(NAMES.map(|name| compiled.matches(name).unwrap()), *expected, "{pattern}");
    }
}

#[test]
fn what_python_cannot_read_is_refused() {
    for bad in [
        r"(",
        r"a)(b",
        r"[a",
        r"*a",
        r"a**",
        r"a{2}{3}",
        r"a{3,2}",
        r"^*",
        r"(?<n>a)",
        r"(?'n'a)",
        r"(?P<1>a)",
        r"(?P<a>a)(?P<a>a)",
        r"(?P=no)",
        r"(?P>n)",
        r"(?R)",
        r"(?U)a",
        r"\h",
        r"\p{L}",
        r"\K",
        r"\G",
        r"\x4",
        r"\u12",
        r"\1",
        r"[z-a]",
        r"[\w-z]",
        r"x(?i)y",
        "\\",
    ] {
        let problem = full(bad).err();
        let problem = problem.unwrap_or_else(|| panic!("{bad} is read"));
        assert_eq!(problem.code, Code::InvalidPattern, "{bad}");
        assert_eq!(problem.setting, "target_modules");
        assert!(problem.found.contains(bad), "{problem}");
    }
    // Patterns that Python supports and this crate does not.
    for refused in [r"(a)?(?(1)b|c)", r"\012", r"[\1]", r"\0", r"(?x) a b"] {
        assert_eq!(code(full(refused)), Some(Code::InvalidPattern), "{refused}");
    }
}

#[test]
fn keys_match_the_end_of_a_name_from_a_dot_or_from_the_start() {
    let matches = |key: &str, name: &str| suffix(key).unwrap().matches(name).unwrap();
    let name = "model.layers.1.mlp.down_proj";
    for key in [
        "down_proj",
        "layers.1.mlp.down_proj",
        r"layers\.1\.mlp\.down_proj",
        "^model.layers.1.mlp.down_proj$",
        "mlp.do[u-z]n_proj",
        "mlp|down_proj",
        r"layers\.(?!2\.)\d+\..*",
        // The first group is PEFT's, of all that stands in front.
        r"1\.(mlp)\.(?!\1)(?!\3)down_proj",
    ] {
        assert!(matches(key, name), "{key}");
    }
    for key in ["own_proj", "^down_proj", "^mlp.*", "1.mlp", "layers.2.mlp.down_proj", "own_.*"] {
        assert!(!matches(key, name), "{key}");
    }
    // Inside of PEFT's own pattern, they are not at the start.
    assert_eq!(code(suffix("(?i)down_proj")), Some(Code::InvalidPattern));
}

#[test]
fn names_are_matched_as_the_regular_expressions_they_are() {
    let keys = ["b.c", r"b\.c", "^a.b.c", "^b.c$", "c", "", "a.b.c.", "b-c", "^", "^$", ".b.c"];
    for key in keys {
        let plain = NamePattern::parse(key).unwrap_or_else(|| panic!("{key} is a name"));
        // The same, but not for the reader of names.
        let regex = suffix(&format!("(?:{key})")).unwrap();
        for name in ["a.b.c", "b.c", "abc", "a.bxc", "x.a.b.c", "c", "", "a.b-c", ".b.c"] {
            assert_eq!(plain.matches(name), regex.matches(name).unwrap(), "{key} on {name}");
        }
    }
    for key in ["a*", "a|b", r"a\b", "(a)", "a$b", "a^", "é"] {
        assert_eq!(NamePattern::parse(key), None, "{key}");
    }
}

#[test]
fn a_pattern_that_backtracks_without_end_is_told_by_its_field() {
    for hostile in
        [r"(?=(\w|\w\w|[^.])*\d\d)x|(?:(?!z)\w+.?)+!", r"((?!z).+)+!", r"(.*)*(?!x)\1\1!"]
    {
        let pattern = full(hostile).unwrap();
        for _ in 0..1000 {
            let problem = pattern.matches(NAMES[0]).unwrap_err();
            assert_eq!(problem.code, Code::PatternTooComplex, "{hostile}");
            assert_eq!(problem.setting, "target_modules");
            assert!(problem.found.contains(hostile), "{problem}");
        }
    }
}

#[test]
fn the_size_of_patterns_is_bounded() {
    let nested = format!("{}a{}", "(".repeat(1 << 20), ")".repeat(1 << 20));
    for large in [
        "a{1000000}".to_owned(),
        "(?:(?:a{100}){100}){100}".to_owned(),
        r"(?:(?=a)\w{99999999999999999999}){2}".to_owned(),
        "(?:(?=)){4000000000}".to_owned(),
        "a|".repeat(4 << 20),
        "x".repeat(8 << 20),
        nested,
    ] {
        let problem = full(&large).unwrap_err();
        assert_eq!(problem.code, Code::PatternTooComplex);
        assert!(problem.to_string().len() < 1000);
    }
    assert_eq!(
        code(full(&format!("{}a{}", "(".repeat(99), ")".repeat(99)))),
        Some(Code::InvalidPattern)
    );
}

#[test]
fn many_patterns_share_the_room_of_a_field() {
    let keys: Vec<String> = (0..5000).map(|n| format!(r"layers\.{n}\.(?!x).*")).collect();
    let mut budget = Budget::shared_by("rank_pattern", &keys);
    let refused = keys.iter().find_map(|key| Pattern::suffix(key, &mut budget).err());
    assert_eq!(refused.unwrap().code, Code::PatternTooComplex);
    // Names are no such patterns.
    let keys: Vec<String> = (0..5000).map(|n| format!("^model.layers.{n}.mlp.up_proj$")).collect();
    let mut budget = Budget::shared_by("rank_pattern", &keys);
    assert!(keys.iter().all(|key| Pattern::suffix(key, &mut budget).is_ok()));
}

#[test]
fn names_of_other_alphabets_are_not_matched() {
    let problem = full(r"\w*").unwrap().matches("modèle").unwrap_err();
    assert_eq!(problem.code, Code::InvalidPattern);
    assert!(problem.found.contains("modèle"), "{problem}");
}

proptest! {
    #[test]
    fn any_text_is_a_pattern_or_refused(text in r"[a-z.*+?()\[\]{}|^$\\0-9<>:=!,P#&~-]{0,40}") {
        if let Ok(pattern) = full(&text) {
            let _ = NAMES.map(|name| pattern.matches(name));
        }
    }
}
