//! Instruments compiled templates, so that their operations are charged to the budget.
//!
//! A few operations suffice to double a string thirty times, and minijinja has no hook between operations. So
//! its instructions are copied, with calls to the functions of [`add_functions`] inserted. The names of these
//! contain brackets, so that templates cannot call them.

use std::collections::BTreeMap;

use minijinja::machinery::{
    CompiledTemplate, Instruction, Instructions, Vm, get_compiled_template, make_string_output,
};
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, State, Template, Value};

use super::template_budget::{
    MAX_ITEMS, affordable, charge, charge_value, check_chars, check_shape, over, printed_len, size,
};

/// Most bytes of a repeated string. minijinja has the same limit, but its error cannot be told from a fault of
/// the template.
const MAX_REPEATED: usize = 100_000_000;

/// Constants above this size are charged like created values: minijinja evaluates operations on constants at
/// compile time.
const MIN_CHARGED_CONSTANT: usize = 4096;

const MADE: &str = "[made]";
const TIMED: &str = "[timed]";
const ITERATED: &str = "[iterated]";
const ASSIGNED: &str = "[assigned]";
const ADDED: &str = "[added]";
const MULTIPLIED: &str = "[multiplied]";
const CONCATENATED: &str = "[concatenated]";

/// Adds the accounting functions.
pub(super) fn add_functions(env: &mut Environment<'_>) {
    env.add_function(MADE, charge_value);
    env.add_function(TIMED, |state: &State<'_, '_>, value: Value| charge(state, 0).map(|()| value));
    env.add_function(ITERATED, |value: Value| check_chars(&value).map(|()| value));
    env.add_function(ASSIGNED, |value: Value, to: Value| {
        check_shape(&Value::from(vec![value.clone()]))?;
        Ok::<_, Error>(pair(value, to))
    });
    env.add_function(ADDED, |state: &State<'_, '_>, a: Value, b: Value| {
        match (a.as_str(), b.as_str()) {
            (Some(a), Some(b)) => affordable(state, a.len() + b.len())?,
            _ => check_items(length(&a).saturating_add(length(&b)))?,
        }
        Ok::<_, Error>(pair(a, b))
    });
    env.add_function(MULTIPLIED, |state: &State<'_, '_>, a: Value, b: Value| {
        let times = a.as_usize().or(b.as_usize()).unwrap_or(1);
        let text = a.as_str().or(b.as_str()).map_or(0, str::len);
        let bytes = text.saturating_mul(times);
        affordable(state, bytes)?;
        check_repeated(bytes)?;
        check_items(length(&a).max(length(&b)).saturating_mul(times))?;
        Ok::<_, Error>(pair(a, b))
    });
    env.add_function(CONCATENATED, |state: &State<'_, '_>, a: Value, b: Value| {
        affordable(state, printed_len(&a)?.saturating_add(printed_len(&b)?))?;
        Ok::<_, Error>(pair(a, b))
    });
}

/// Two operands for `UnpackList`, which pushes the first element last.
fn pair(below: Value, top: Value) -> Value {
    Value::from(vec![top, below])
}

/// Number of elements of a list; 0 for other values.
fn length(value: &Value) -> usize {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => value.len().unwrap_or(0),
        _ => 0,
    }
}

fn check_repeated(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_REPEATED {
        return Err(over(format!("repeats a string to more than {MAX_REPEATED} bytes")));
    }
    Ok(())
}

fn check_items(items: usize) -> Result<(), Error> {
    if items > MAX_ITEMS {
        return Err(over(format!("makes a list of more than {MAX_ITEMS} elements")));
    }
    Ok(())
}

/// Renders a template with its operations charged. Its environment must have the accounting functions.
pub(super) fn render<'env>(
    env: &'env Environment<'env>,
    template: &Template<'env, 'env>,
    context: Value,
) -> Result<String, Error> {
    let CompiledTemplate { instructions, blocks, initial_auto_escape, .. } =
        get_compiled_template(template);
    let blocks: BTreeMap<&str, _> =
        blocks.iter().map(|(name, block)| (*name, instrumented(block))).collect();
    let mut text = String::new();
    let mut output = make_string_output(&mut text);
    let instructions = instrumented(instructions);
    Vm::new(env).eval(&instructions, context, &blocks, &mut output, *initial_auto_escape)?;
    Ok(text)
}

/// The same instructions, with calls to the accounting functions inserted.
fn instrumented<'env>(instructions: &Instructions<'env>) -> Instructions<'env> {
    let all = || (0..).map_while(|at| Some((at, instructions.get(at)?)));
    let mut moved = Vec::new();
    let mut length = 0;
    for (_, instruction) in all() {
        moved.push(length);
        length += expanded(instruction).len() as u32;
    }
    // Jumps may target the end, one past the last instruction.
    moved.push(length);
    let mut result = Instructions::new(instructions.name(), instructions.source());
    for (at, instruction) in all() {
        for mut instruction in expanded(instruction) {
            move_target(&mut instruction, &moved);
            match (instructions.get_span(at), instructions.get_line(at)) {
                (Some(span), _) => result.add_with_span(instruction, span),
                (None, Some(line)) => {
                    result.add_with_line(instruction, u16::try_from(line).unwrap_or(u16::MAX))
                }
                (None, None) => result.add(instruction),
            };
        }
    }
    result
}

/// An instruction with the accounting calls before and after it.
fn expanded<'env>(instruction: &Instruction<'env>) -> Vec<Instruction<'env>> {
    use Instruction as I;
    let this = instruction.clone();
    let call = |name, operands| I::CallFunction(name, Some(operands));
    let operator = |name| vec![call(name, 2), I::UnpackList(2), this.clone(), call(MADE, 1)];
    match instruction {
        I::Add => operator(ADDED),
        I::Mul => operator(MULTIPLIED),
        I::StringConcat => operator(CONCATENATED),
        I::SetAttr(_) => vec![call(ASSIGNED, 2), I::UnpackList(2), this],
        I::PushLoop(_) => vec![call(ITERATED, 1), this],
        // The environment's formatter charges what is printed.
        I::EmitRaw(text) => vec![I::LoadConst(Value::from(*text)), I::Emit],
        I::LoadConst(value) if size(value) > MIN_CHARGED_CONSTANT => vec![this, call(MADE, 1)],
        I::ApplyFilter(..)
        | I::BuildList(_)
        | I::BuildMap(_)
        | I::CallFunction(..)
        | I::CallMethod(..)
        | I::CallObject(_)
        | I::Slice
        | I::PerformTest(..)
        | I::In
        | I::Eq
        | I::Ne
        | I::Lt
        | I::Lte
        | I::Gt
        | I::Gte => vec![this, call(MADE, 1)],
        // These create little, but may walk a whole string or list, so the time is checked.
        I::GetItem | I::CompareAndPreserve(_) => vec![call(TIMED, 1), this],
        _ => vec![this],
    }
}

/// Adjusts the target of a jump.
fn move_target(instruction: &mut Instruction<'_>, moved: &[u32]) {
    use Instruction as I;
    if let I::Iterate(to)
    | I::Jump(to)
    | I::JumpIfFalse(to)
    | I::JumpIfFalseOrPop(to)
    | I::JumpIfTrueOrPop(to)
    | I::BuildMacro(_, to, _) = instruction
    {
        *to = moved.get(*to as usize).copied().unwrap_or(u32::MAX);
    }
}
