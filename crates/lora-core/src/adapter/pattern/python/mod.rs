//! Translates Python's `re` syntax to that of `fancy_regex`.
//!
//! Syntax that means the same in both is kept: groups, look-around, alternatives, repetitions. Escapes and
//! character sets are rewritten for ASCII (as module names are), since `\Z`, `\<`, `&&` and `[` in a set
//! have another meaning in `fancy_regex`. Patterns that Python refuses are refused, and so are octal
//! escapes, conditional groups and verbose patterns, which Python supports.

use super::class::Class;

mod groups;

const OCTAL: &str = "octal escapes are not supported";
const BAD_RANGE: &str = "bad character range";

/// The context of a pattern.
#[derive(Default, Debug)]
pub(super) struct Syntax {
    /// Whether it may begin with flags such as `(?i)`.
    pub flags_at_start: bool,
    /// Group names that are used already.
    pub names: Vec<String>,
}

/// A pattern in the syntax of `fancy_regex`.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Translated {
    pub text: String,
    /// Number of atoms, with repetitions expanded to their maximum.
    pub atoms: usize,
}

/// Translates a pattern; the error says what is not supported, and where.
pub(super) fn translate(pattern: &str, syntax: Syntax) -> Result<Translated, String> {
    let out = String::with_capacity(pattern.len());
    let mut reader = Reader { rest: pattern, out, frames: vec![Frame::default()], syntax };
    reader.read().map_err(|problem| {
        let position = pattern[..pattern.len() - reader.rest.len()].chars().count();
        format!("{problem}, near position {position}")
    })
}

/// An open group, or the whole pattern.
#[derive(Default, Debug)]
struct Frame {
    atoms: usize,
    last: Last,
}

/// The item before a repetition.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Last {
    /// Nothing, or an anchor.
    #[default]
    Nothing,
    /// This many atoms.
    Atoms(usize),
    /// A repetition.
    Repetition,
}

struct Reader<'a> {
    rest: &'a str,
    out: String,
    frames: Vec<Frame>,
    syntax: Syntax,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<Translated, String> {
        while self.syntax.flags_at_start && self.global_flags() {}
        while let Some(next) = self.next() {
            match next {
                '\\' => self.escape()?,
                '[' => self.set()?,
                '(' => self.open()?,
                ')' => self.close()?,
                '|' => {
                    self.out.push('|');
                    self.frame().last = Last::Nothing;
                }
                '^' | '$' => self.anchor(if next == '^' { "^" } else { "$" }),
                '*' | '+' | '?' => {
                    self.out.push(next);
                    self.repeat(1)?;
                }
                '{' => self.brace()?,
                '.' => self.atom("."),
                literal => self.literal(literal),
            }
        }
        match (self.frames.pop(), self.frames.len()) {
            (Some(Frame { atoms, .. }), 0) => {
                Ok(Translated { text: std::mem::take(&mut self.out), atoms })
            }
            _ => Err("missing ), unterminated group".to_owned()),
        }
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let next = chars.next();
        self.rest = chars.as_str();
        next
    }

    /// Consumes a text if it comes next.
    fn eat(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn frame(&mut self) -> &mut Frame {
        if self.frames.is_empty() {
            self.frames.push(Frame::default());
        }
        let last = self.frames.len() - 1;
        &mut self.frames[last]
    }

    fn add(&mut self, atoms: usize) {
        let frame = self.frame();
        frame.atoms = frame.atoms.saturating_add(atoms);
        frame.last = Last::Atoms(atoms);
    }

    fn atom(&mut self, text: &str) {
        self.out.push_str(text);
        self.add(1);
    }

    fn anchor(&mut self, text: &str) {
        self.out.push_str(text);
        self.frame().last = Last::Nothing;
    }

    fn literal(&mut self, literal: char) {
        // In `fancy_regex`, `\<` and `\>` are word boundaries.
        if literal.is_ascii_punctuation() && !matches!(literal, '<' | '>' | '_') {
            self.out.push('\\');
        }
        self.out.push(literal);
        self.add(1);
    }

    /// The suffix of a repetition, `?` or `+`; it repeats up to `times`.
    fn repeat(&mut self, times: usize) -> Result<(), String> {
        for suffix in ["?", "+"] {
            if self.eat(suffix) {
                self.out.push_str(suffix);
                break;
            }
        }
        let frame = self.frame();
        match std::mem::replace(&mut frame.last, Last::Repetition) {
            Last::Nothing => Err("nothing to repeat".to_owned()),
            Last::Repetition => Err("multiple repeat".to_owned()),
            Last::Atoms(atoms) => {
                let more = atoms.saturating_mul(times.saturating_sub(1));
                frame.atoms = frame.atoms.saturating_add(more);
                Ok(())
            }
        }
    }

    /// `{m}`, `{m,}`, `{,n}` or `{m,n}`; any other `{` is a literal.
    fn brace(&mut self) -> Result<(), String> {
        let bounds = self.rest.split_once('}').and_then(|(bounds, rest)| {
            let (least, most) = bounds.split_once(',').unwrap_or((bounds, bounds));
            let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
            let valid = !bounds.is_empty() && digits(least) && digits(most);
            valid.then_some((least, most, rest))
        });
        let Some((least, most, rest)) = bounds else {
            self.literal('{');
            return Ok(());
        };
        self.rest = rest;
        // Counts that overflow are too large in any case.
        let count = |text: &str| text.parse().unwrap_or(usize::MAX);
        let least = if least.is_empty() { 0 } else { count(least) };
        let times = if most.is_empty() { least } else { count(most) };
        if times < least {
            return Err("min repeat greater than max repeat".to_owned());
        }
        self.out +=
            &if most.is_empty() { format!("{{{least},}}") } else { format!("{{{least},{times}}}") };
        self.repeat(times)
    }

    fn escape(&mut self) -> Result<(), String> {
        let escaped = self.next().ok_or("bad escape (end of pattern)")?;
        match escaped {
            'A' => self.anchor(r"\A"),
            'Z' | 'z' => self.anchor(r"\z"),
            'b' => self.anchor(r"\b"),
            'B' => self.anchor(r"\B"),
            '1'..='9' => self.back_reference(escaped)?,
            _ => match Class::of_escape(escaped) {
                Some(class) => {
                    self.out.push_str(&class.text(false));
                    self.add(1);
                }
                None => {
                    let literal = self.escaped_character(escaped)?;
                    self.literal(literal);
                }
            },
        }
        Ok(())
    }

    /// A back-reference of one or two digits.
    fn back_reference(&mut self, first: char) -> Result<(), String> {
        let digits = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits > 1 {
            return Err(OCTAL.to_owned());
        }
        let number = format!("{first}{}", &self.rest[..digits]);
        self.rest = &self.rest[digits..];
        self.atom(&format!(r"\{number}"));
        Ok(())
    }

    /// The character of an escape, inside or outside of a set.
    fn escaped_character(&mut self, escaped: char) -> Result<char, String> {
        let digits = match escaped {
            'a' => return Ok('\x07'),
            'f' => return Ok('\x0c'),
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'v' => return Ok('\x0b'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            '0'..='9' => return Err(OCTAL.to_owned()),
            _ if escaped.is_ascii_alphabetic() => return Err(format!(r"bad escape \{escaped}")),
            _ => return Ok(escaped),
        };
        let code = self.rest.get(..digits).filter(|c| c.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = code.and_then(|code| u32::from_str_radix(code, 16).ok());
        let character = code.and_then(char::from_u32);
        let character = character.ok_or_else(|| format!(r"incomplete escape \{escaped}"))?;
        self.rest = &self.rest[digits..];
        Ok(character)
    }

    /// A set of characters, `[...]`.
    fn set(&mut self) -> Result<(), String> {
        let negated = self.eat("^");
        let mut class = Class::default();
        let mut first = true;
        loop {
            let next = self.next().ok_or("unterminated character set")?;
            if next == ']' && !first {
                break;
            }
            first = false;
            let low = self.member(next)?;
            let is_range = self.rest.starts_with('-') && !self.rest.starts_with("-]");
            match low {
                Member::One(low) if is_range => {
                    self.next();
                    class.insert(low, self.end_of_range(low)?);
                }
                Member::One(one) => class.insert(one, one),
                Member::Class(_) if is_range => return Err(BAD_RANGE.to_owned()),
                Member::Class(members) => class.0 |= members.0,
            }
        }
        self.out.push_str(&class.text(negated));
        self.add(1);
        Ok(())
    }

    fn end_of_range(&mut self, low: char) -> Result<char, String> {
        let next = self.next().ok_or("unterminated character set")?;
        match self.member(next)? {
            Member::One(high) if high >= low => Ok(high),
            _ => Err(BAD_RANGE.to_owned()),
        }
    }

    fn member(&mut self, character: char) -> Result<Member, String> {
        if character != '\\' {
            return Ok(Member::One(character));
        }
        let escaped = self.next().ok_or("unterminated character set")?;
        match Class::of_escape(escaped) {
            Some(class) => Ok(Member::Class(class)),
            None if escaped == 'b' => Ok(Member::One('\x08')),
            None => self.escaped_character(escaped).map(Member::One),
        }
    }
}

/// An item of a set.
enum Member {
    One(char),
    Class(Class),
}
