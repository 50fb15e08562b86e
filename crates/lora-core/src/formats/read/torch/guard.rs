//! Bounds on the time and memory of running a pickle.

use std::collections::HashMap;

use super::opcodes::{Effect, Op};

/// Maximum nesting of values; a parameter in a state dict needs nine. Values are dropped and copied
/// recursively, so this bounds the use of the call stack.
const MAX_DEPTH: usize = 32;

/// Size that is counted for a value, besides its text.
const VALUE: u64 = 64;

/// Bytes of values that a program may create for each of its own bytes, and a constant allowance. A tensor
/// takes some fifteen for each byte that describes it.
const BYTES_FOR_EACH: u64 = 32;
const BYTES_FOR_ALL: u64 = 1 << 20;

/// Nesting depth and size of a value on the stack or in the memo.
#[derive(Clone, Copy)]
struct Shadow {
    depth: usize,
    bytes: u64,
}

/// Mirrors the stack and the memo of the pickle machine, tracking only depths and sizes. candle's memo copies
/// values when they are stored and loaded, so a short program could otherwise create exponentially many.
pub(super) struct Guard {
    stack: Vec<Shadow>,
    marks: Vec<usize>,
    memo: HashMap<u32, Shadow>,
    left: u64,
}

impl Guard {
    /// A guard for a program of this many bytes.
    pub fn new(program: usize) -> Self {
        Self {
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            left: BYTES_FOR_ALL + BYTES_FOR_EACH * program as u64,
        }
    }

    /// Applies the effect of the next instruction; an error if it must not be run.
    pub fn follow(&mut self, op: &Op<'_>) -> Result<(), String> {
        match op.effect {
            Effect::Nothing | Effect::Stop => Ok(()),
            Effect::Unused(name) => {
                Err(format!("its pickle uses {name}, which torch does not write"))
            }
            Effect::Mark => {
                self.marks.push(self.stack.len());
                self.spend(VALUE)
            }
            Effect::Leaf => self.push(Shadow { depth: 1, bytes: VALUE + op.argument.len() as u64 }),
            Effect::Join(count) => self.join(count),
            Effect::JoinMarked => self.marked().and_then(|count| self.join(count)),
            Effect::Fold(count) => self.fold(count),
            Effect::FoldMarked => self.marked().and_then(|count| self.fold(count)),
            Effect::Put => {
                let top = self
                    .stack
                    .last()
                    .copied()
                    .ok_or("its pickle stores a value in its memo from an empty stack")?;
                self.spend(top.bytes)?;
                self.memo.insert(op.memo(), top);
                Ok(())
            }
            Effect::Get => {
                let noted = self.memo.get(&op.memo()).copied();
                let noted = noted.ok_or("its pickle loads a memo entry that it never stored")?;
                self.spend(noted.bytes)?;
                self.stack.push(noted);
                Ok(())
            }
        }
    }

    fn spend(&mut self, bytes: u64) -> Result<(), String> {
        let left = self.left.checked_sub(bytes);
        self.left = left.ok_or("its pickle makes more values than a state dict of its size has")?;
        Ok(())
    }

    fn push(&mut self, value: Shadow) -> Result<(), String> {
        self.spend(value.bytes)?;
        self.stack.push(value);
        Ok(())
    }

    /// The number of values above the last mark; removes the mark.
    fn marked(&mut self) -> Result<usize, String> {
        let mark = self.marks.pop().ok_or("its pickle pops a mark that does not exist")?;
        Ok(self.stack.len() - mark)
    }

    /// Pops values, which must not be marks.
    fn pop(&mut self, count: usize) -> Result<Shadow, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|start| *start >= floor);
        let start = start.ok_or("its pickle pops more values than it pushed")?;
        let none = Shadow { depth: 0, bytes: 0 };
        Ok(self.stack.drain(start..).fold(none, |all, value| Shadow {
            depth: all.depth.max(value.depth),
            bytes: all.bytes + value.bytes,
        }))
    }

    fn join(&mut self, count: usize) -> Result<(), String> {
        let inner = self.pop(count)?;
        self.spend(VALUE)?;
        self.nest(Shadow { depth: 0, bytes: VALUE }, inner)
    }

    fn fold(&mut self, count: usize) -> Result<(), String> {
        let inner = self.pop(count)?;
        let outer = self.pop(1)?;
        self.nest(outer, inner)
    }

    fn nest(&mut self, outer: Shadow, inner: Shadow) -> Result<(), String> {
        let depth = outer.depth.max(inner.depth + 1);
        if depth > MAX_DEPTH {
            return Err(format!("its pickle nests values more than {MAX_DEPTH} deep"));
        }
        self.stack.push(Shadow { depth, bytes: outer.bytes + inner.bytes });
        Ok(())
    }
}
