//! Printing JSON as Python's `json.dumps` does.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::{Value, ser::Formatter};

/// The formatting arguments of `json.dumps`.
#[derive(Clone, Debug)]
pub(super) struct JsonStyle {
    /// Spaces for each level of nesting; none: everything on one line.
    pub(super) indent: Option<usize>,
    /// Separator between items.
    pub(super) item_separator: String,
    /// Separator between a key and its value.
    pub(super) key_separator: String,
    /// Whether non-ASCII characters are escaped as `\uXXXX`.
    pub(super) ensure_ascii: bool,
}

impl JsonStyle {
    /// Python's default separators: with an indent, no space follows a comma.
    pub(super) fn with_indent(indent: Option<usize>) -> Self {
        Self {
            indent,
            item_separator: if indent.is_some() { "," } else { ", " }.to_owned(),
            key_separator: ": ".to_owned(),
            ensure_ascii: false,
        }
    }
}

/// Prints `value` in the given style.
pub(super) fn dumps(value: &Value, style: JsonStyle) -> Result<String, serde_json::Error> {
    let mut bytes = Vec::new();
    let formatter = PythonFormatter { style, depth: 0, has_items: false };
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    String::from_utf8(bytes).map_err(|error| serde_json::Error::io(io::Error::other(error)))
}

struct PythonFormatter {
    style: JsonStyle,
    depth: usize,
    /// Whether the innermost list or object has an item; empty ones stay on one line.
    has_items: bool,
}

impl PythonFormatter {
    fn open<W: Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_items = false;
        out.write_all(bracket)
    }

    fn close<W: Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_items {
            self.new_line(out)?;
        }
        // The closed value is itself an item of the enclosing one.
        self.has_items = true;
        out.write_all(bracket)
    }

    fn item<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.style.item_separator.as_bytes())?;
        }
        self.has_items = true;
        self.new_line(out)
    }

    fn new_line<W: Write + ?Sized>(&self, out: &mut W) -> io::Result<()> {
        match self.style.indent {
            Some(indent) => write!(out, "\n{:1$}", "", indent * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonFormatter {
    fn begin_array<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.style.key_separator.as_bytes())
    }

    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.style.ensure_ascii {
            return out.write_all(fragment.as_bytes());
        }
        for unit in fragment.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte @ b' '..=b'~') => out.write_all(&[byte])?,
                _ => write!(out, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn nesting_is_indented_and_empty_collections_are_not() {
        let value = json!({"a": [], "b": [[1], {}], "c": {"d": "x"}});
        let text = dumps(&value, JsonStyle::with_indent(Some(1))).unwrap();
        let expected = "{\n \"a\": [],\n \"b\": [\n  [\n   1\n  ],\n  {}\n ],\n \"c\": {\n  \
            \"d\": \"x\"\n }\n}";
        assert_eq!(text, expected);
    }

    #[test]
    fn one_line_has_spaces_after_separators() {
        let text = dumps(&json!({"a": [1, "<é>\n"]}), JsonStyle::with_indent(None)).unwrap();
        assert_eq!(text, r#"{"a": [1, "<é>\n"]}"#);
    }

    #[test]
    fn ascii_only_output_uses_surrogate_pairs() {
        let style = JsonStyle { ensure_ascii: true, ..JsonStyle::with_indent(None) };
        assert_eq!(dumps(&json!("\u{7f}é🦙"), style).unwrap(), r#""\u007f\u00e9\ud83e\udd99""#);
    }

    proptest! {
        #[test]
        fn any_string_reads_back(text: String, ensure_ascii: bool, indent in 0usize..3) {
            let value = json!({ text.as_str(): [text, [], null] });
            let style = JsonStyle { ensure_ascii, ..JsonStyle::with_indent(Some(indent)) };
            let written = dumps(&value, style).unwrap();
            prop_assert!(!ensure_ascii || written.is_ascii());
            prop_assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), value);
        }
    }
}
