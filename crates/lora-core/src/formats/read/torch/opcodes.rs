//! Decodes the instructions of a pickle without running them.

use super::Problem;

/// The effect of an instruction on the stack and the memo, as [`super::guard`] tracks it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// Nothing.
    Nothing,
    /// Pushes a value that contains no others.
    Leaf,
    /// Pops so many values and pushes one.
    Join(usize),
    /// Pops all values above the mark, and the mark, and pushes one.
    JoinMarked,
    /// Pops so many values and adds them to the one below.
    Fold(usize),
    /// Pops all values above the mark, and the mark, and adds them to the one below.
    FoldMarked,
    /// Pushes a mark.
    Mark,
    /// Stores the top of the stack in the memo.
    Put,
    /// Pushes a value from the memo.
    Get,
    /// Ends the program.
    Stop,
    /// Not supported, as state dicts do not need it; the text is its name.
    Unused(&'static str),
}

/// The argument that follows an opcode.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Argument {
    /// A fixed number of bytes.
    Bytes(usize),
    /// A text, after its length in so many bytes.
    Counted(usize),
    /// Two lines: module and name.
    Global,
}

use Argument::{Bytes, Counted, Global};
use Effect::{Fold, FoldMarked, Get, Join, JoinMarked, Leaf, Mark, Nothing, Put, Stop, Unused};

pub(super) const GLOBAL: u8 = b'c';
pub(super) const STACK_GLOBAL: u8 = 0x93;
pub(super) const REDUCE: u8 = b'R';
pub(super) const BUILD: u8 = b'b';
pub(super) const LONG1: u8 = 0x8a;

/// The instructions that torch writes (protocol 2), and those of other protocols that are decoded only to
/// find every global after them.
///
/// `d` (DICT) is not supported because candle runs it as EMPTY_DICT and would lose the items.
const TABLE: &[(u8, Argument, Effect)] = &[
    (0x80, Bytes(1), Nothing),
    (GLOBAL, Global, Leaf),
    (b'q', Bytes(1), Put),
    (b'r', Bytes(4), Put),
    (b'h', Bytes(1), Get),
    (b'j', Bytes(4), Get),
    (b'(', Bytes(0), Mark),
    (b')', Bytes(0), Leaf),
    (b't', Bytes(0), JoinMarked),
    (0x85, Bytes(0), Join(1)),
    (0x86, Bytes(0), Join(2)),
    (0x87, Bytes(0), Join(3)),
    (b'}', Bytes(0), Leaf),
    (b']', Bytes(0), Leaf),
    (b's', Bytes(0), Fold(2)),
    (b'u', Bytes(0), FoldMarked),
    (b'a', Bytes(0), Fold(1)),
    (b'e', Bytes(0), FoldMarked),
    (b'X', Counted(4), Leaf),
    (b'J', Bytes(4), Leaf),
    (b'K', Bytes(1), Leaf),
    (b'M', Bytes(2), Leaf),
    (LONG1, Counted(1), Leaf),
    (b'G', Bytes(8), Leaf),
    (b'N', Bytes(0), Leaf),
    (0x88, Bytes(0), Leaf),
    (0x89, Bytes(0), Leaf),
    (b'Q', Bytes(0), Join(1)),
    (REDUCE, Bytes(0), Join(2)),
    (BUILD, Bytes(0), Fold(1)),
    (b'.', Bytes(0), Stop),
    (0x95, Bytes(8), Unused("FRAME")),
    (0x8c, Counted(1), Unused("SHORT_BINUNICODE")),
    (0x94, Bytes(0), Unused("MEMOIZE")),
    (STACK_GLOBAL, Bytes(0), Unused("STACK_GLOBAL")),
    (0x81, Bytes(0), Unused("NEWOBJ")),
    (0x92, Bytes(0), Unused("NEWOBJ_EX")),
    (b'i', Global, Unused("INST")),
    (b'o', Bytes(0), Unused("OBJ")),
    (b'd', Bytes(0), Unused("DICT")),
    (b'0', Bytes(0), Unused("POP")),
    (b'1', Bytes(0), Unused("POP_MARK")),
    (b'2', Bytes(0), Unused("DUP")),
];

/// One instruction.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Op<'a> {
    /// Its code.
    pub code: u8,
    /// Its effect on the stack.
    pub effect: Effect,
    /// The argument, without a length prefix.
    pub argument: &'a [u8],
    /// The encoded instruction.
    pub bytes: &'a [u8],
}

impl<'a> Op<'a> {
    /// The memo index of a PUT or GET.
    pub fn memo(&self) -> u32 {
        let mut number = [0; 4];
        number.iter_mut().zip(self.argument).for_each(|(to, from)| *to = *from);
        u32::from_le_bytes(number)
    }

    /// Module and name of a GLOBAL.
    pub fn global(&self) -> Option<(&'a str, &'a str)> {
        if !matches!(self.code, GLOBAL | b'i') {
            return None;
        }
        let text = std::str::from_utf8(self.argument).unwrap_or("(not a text)\n(not a text)\n");
        let mut lines = text.lines();
        Some((lines.next().unwrap_or(""), lines.next().unwrap_or("")))
    }

    /// The text that the instruction pushes.
    pub fn text(&self) -> Option<&'a str> {
        let is_text = matches!(self.code, b'X' | 0x8c);
        std::str::from_utf8(self.argument).ok().filter(|_| is_text)
    }
}

/// Iterator over the instructions of a program, up to STOP.
pub(super) struct Ops<'a> {
    program: &'a [u8],
    at: usize,
    ended: bool,
}

impl<'a> Ops<'a> {
    /// Every instruction of `program`.
    pub fn of(program: &'a [u8]) -> Self {
        Self { program, at: 0, ended: false }
    }

    fn decode(&self) -> Result<Op<'a>, Problem> {
        let rest = &self.program[self.at..];
        let Some((&code, after)) = rest.split_first() else {
            return Err(Problem::Invalid("its pickle has no end".to_owned()));
        };
        let Some((_, argument, effect)) = TABLE.iter().find(|row| row.0 == code) else {
            let problem =
                format!("its pickle has the opcode {code:#04x}, which torch does not write");
            return Err(Problem::Invalid(problem));
        };
        let Some((skipped, length)) = extent(*argument, after) else {
            return Err(Problem::Invalid("its pickle ends within an instruction".to_owned()));
        };
        let bytes = &rest[..1 + skipped + length];
        Ok(Op { code, effect: *effect, argument: &bytes[1 + skipped..], bytes })
    }
}

/// The lengths of an argument's prefix and of the argument; `None` if the program ends before.
fn extent(argument: Argument, after: &[u8]) -> Option<(usize, usize)> {
    let (skipped, length) = match argument {
        Bytes(count) => (0, count),
        Counted(width) => {
            let digits = after.get(..width)?;
            (width, digits.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte)))
        }
        Global => {
            let mut ends = after.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            (0, ends.nth(1)?.0 + 1)
        }
    };
    (length <= after.len() - skipped).then_some((skipped, length))
}

impl<'a> Iterator for Ops<'a> {
    type Item = Result<Op<'a>, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let decoded = self.decode();
        match &decoded {
            Ok(op) => {
                self.at += op.bytes.len();
                self.ended = op.effect == Stop;
            }
            Err(_) => self.ended = true,
        }
        if self.ended && decoded.is_ok() && self.at < self.program.len() {
            let problem = "its pickle has data after its end".to_owned();
            return Some(Err(Problem::Invalid(problem)));
        }
        Some(decoded)
    }
}
