//! Groups, look-around, flags, and other syntax that begins with a parenthesis.

use super::{Frame, Reader};

impl Reader<'_> {
    pub(super) fn open(&mut self) -> Result<(), String> {
        if self.eat("?#") {
            let (_, rest) = self.rest.split_once(')').ok_or("missing ), unterminated comment")?;
            self.rest = rest;
            return Ok(());
        }
        if self.eat("?P=") {
            let name = self.group_name(')')?;
            if !self.syntax.names.contains(&name) {
                return Err(format!("unknown group name `{name}`"));
            }
            self.atom(&format!("(?P={name})"));
            return Ok(());
        }
        if self.eat("?P<") {
            let name = self.group_name('>')?;
            if self.syntax.names.contains(&name) {
                return Err(format!("redefinition of group name `{name}`"));
            }
            self.out += &format!("(?P<{name}>");
            self.syntax.names.push(name);
        } else if let Some(opening) =
            ["?:", "?=", "?!", "?<=", "?<!", "?>"].into_iter().find(|opening| self.eat(opening))
        {
            self.out += &format!("({opening}");
        } else if self.eat("?(") {
            return Err("conditional groups are not supported".to_owned());
        } else if self.eat("?") {
            return self.flags();
        } else {
            self.out.push('(');
        }
        self.frames.push(Frame::default());
        Ok(())
    }

    pub(super) fn close(&mut self) -> Result<(), String> {
        match self.frames.pop() {
            Some(frame) if !self.frames.is_empty() => {
                self.out.push(')');
                self.add(frame.atoms.saturating_add(1));
                Ok(())
            }
            _ => Err("unbalanced parenthesis".to_owned()),
        }
    }

    fn group_name(&mut self, end: char) -> Result<String, String> {
        let (name, rest) = self.rest.split_once(end).ok_or("missing end of a group name")?;
        let letters = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !letters || name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err("bad character in group name".to_owned());
        }
        self.rest = rest;
        Ok(name.to_owned())
    }

    /// Parses `(?flags)` at the start of the pattern; whether it was there.
    pub(super) fn global_flags(&mut self) -> bool {
        let group = self.rest.strip_prefix("(?").and_then(|rest| rest.split_once(')'));
        let Some((flags, rest)) = group.filter(|(flags, _)| {
            !flags.is_empty()
                && flags.chars().all(|flag| matches!(flag, 'a' | 'i' | 'm' | 's' | 'u'))
        }) else {
            return false;
        };
        let kept = kept_flags(flags);
        if !kept.is_empty() {
            self.out += &format!("(?{kept})");
        }
        self.rest = rest;
        true
    }

    /// Parses `(?flags:` of a group.
    fn flags(&mut self) -> Result<(), String> {
        let length = self.rest.find([')', ':']).ok_or("unknown extension of a group")?;
        let flags = &self.rest[..length];
        let known = |flag: char| matches!(flag, 'a' | 'i' | 'm' | 's' | 'u' | '-');
        if let Some(other) = flags.chars().find(|flag| !known(*flag)) {
            return Err(format!("the flag or extension `(?{other}` is not supported"));
        }
        if self.rest[length..].starts_with(')') {
            return Err("global flags not at the start of the expression".to_owned());
        }
        self.out += &format!("(?{}:", kept_flags(flags));
        self.rest = &self.rest[length + 1..];
        self.frames.push(Frame::default());
        Ok(())
    }
}

/// The flags, without `a` and `u`, which do not matter for ASCII.
fn kept_flags(flags: &str) -> String {
    flags.chars().filter(|flag| !matches!(flag, 'a' | 'u')).collect()
}
