//! Runs a pickle and returns the value that it describes.

use std::collections::HashSet;

use candle_core::pickle::{Object, Stack};

use super::Problem;
use super::guard::Guard;
use super::names::{METADATA, StorageClass};
use super::opcodes::{BUILD, Effect, LONG1, Op, Ops, REDUCE, STACK_GLOBAL};

/// Runs a pickle if all globals that it names are allowed.
pub(super) fn unpickle(program: &[u8]) -> Result<Object, Problem> {
    let recalled = scan(program)?;
    run(program, &recalled).map_err(Problem::Invalid)
}

/// Checks all globals that the program names, whether or not they end up in the result. Returns the memo
/// indices that it loads.
fn scan(program: &[u8]) -> Result<HashSet<u32>, Problem> {
    let mut recalled = HashSet::new();
    let mut texts = ["", ""];
    for op in Ops::of(program) {
        let op = op?;
        let named = match op.code {
            // Takes the two strings on top of the stack, which are normally the last two of the program.
            STACK_GLOBAL => Some((texts[0], texts[1])),
            _ => op.global(),
        };
        if let Some((module, name)) = named.filter(|(module, name)| !is_allowed(module, name)) {
            return Err(Problem::Forbidden(format!("{module}.{name}")));
        }
        if let Some(text) = op.text() {
            texts = [texts[1], text];
        }
        if op.effect == Effect::Get {
            recalled.insert(op.memo());
        }
    }
    Ok(recalled)
}

fn is_allowed(module: &str, name: &str) -> bool {
    match module {
        "collections" => name == "OrderedDict",
        "torch._utils" => matches!(name, "_rebuild_tensor_v2" | "_rebuild_parameter"),
        "torch" => StorageClass::named(name).is_some(),
        _ => false,
    }
}

fn run(program: &[u8], recalled: &HashSet<u32>) -> Result<Object, String> {
    let mut guard = Guard::new(program.len());
    let mut machine = Stack::empty();
    for op in Ops::of(program).map_while(Result::ok) {
        // Python memoises every value that it writes. A copy that is never loaded is not worth making.
        if op.effect == Effect::Put && !recalled.contains(&op.memo()) {
            continue;
        }
        guard.follow(&op)?;
        check_meaning(&op, machine.stack())?;
        let mut bytes = op.bytes;
        machine.read(&mut bytes).map_err(|error| {
            let message = error.to_string();
            let line: String = message.lines().next().unwrap_or("").chars().take(120).collect();
            format!("its pickle is malformed ({line})")
        })?;
        // candle's memo holds a copy, whereas in Python later changes to the object show there, too.
        let recalls = op.effect == Effect::Get;
        if recalls && matches!(machine.stack().last(), Some(Object::Dict(_) | Object::List(_))) {
            return Err("its pickle uses one dict or list in two places".to_owned());
        }
    }
    match machine.stack().len() {
        1 => machine.finalize().map_err(|error| error.to_string()),
        count => Err(format!("its pickle leaves {count} values, not one")),
    }
}

/// Refuses instructions that candle runs differently from Python.
fn check_meaning(op: &Op<'_>, stack: &[Object]) -> Result<(), String> {
    match (op.code, stack) {
        // candle drops the arguments of an OrderedDict.
        (REDUCE, [.., Object::Class { module_name, .. }, args])
            if module_name == "collections" && *args != Object::Tuple(Vec::new()) =>
        {
            Err("its pickle makes an OrderedDict from arguments".to_owned())
        }
        // candle turns attributes into items. A state dict has one attribute, the module versions.
        (BUILD, [.., state]) if !is_metadata(state) => {
            Err("its pickle sets attributes other than a state dict's _metadata".to_owned())
        }
        // candle reads all numbers as unsigned.
        (LONG1, _) if op.argument.len() > 8 || op.argument.last().is_some_and(|b| *b >= 0x80) => {
            Err("its pickle has a number that is negative or too large".to_owned())
        }
        _ => Ok(()),
    }
}

fn is_metadata(state: &Object) -> bool {
    let Object::Dict(items) = state else { return false };
    matches!(&items[..], [(Object::Unicode(name), Object::Dict(_))] if name == METADATA)
}
