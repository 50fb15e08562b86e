//! Limits on compiling a chat template. minijinja limits the execution of templates, but not their compilation.
//!
//! The compiler turns a chain of operators into a tree of the same depth, which it walks recursively, and it
//! evaluates operations on constants. So a short template could overflow the stack or exhaust memory before
//! it runs.

use minijinja::Value;
use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};
use minijinja::machinery::{Token, WhitespaceConfig, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;

use super::TextError;
use super::template_budget::size;

/// Most operators, brackets and lookups in one `{{ }}` or `{% %}`. A tree of this depth fits the stack of a
/// thread, as the test below shows.
const MAX_OPERATORS: usize = 500;

/// Most `elif` branches of a template. Each is nested in the one before, so they have the same limit.
const MAX_BRANCHES: usize = 500;

/// Most bytes of all constants that the compiler computes from others.
const MAX_CONSTANTS: usize = 1 << 20;

/// Fails with [`TextError::ChatTemplateSyntax`] if compiling the template could exceed a limit. Syntax errors are
/// left to the compiler.
pub(super) fn check(name: &str, source: &str) -> Result<(), TextError> {
    let too_costly = |line: u16, does: String| {
        Err(TextError::ChatTemplateSyntax { reason: format!("it {does} (in {name}:{line})") })
    };
    let (mut operators, mut branches) = (0, 0);
    let syntax = SyntaxConfig;
    for (token, span) in
        tokenize(source, false, syntax.clone(), WhitespaceConfig::default()).flatten()
    {
        match token {
            Token::VariableStart | Token::BlockStart => operators = 0,
            Token::Ident("elif") => branches += 1,
            token => operators += usize::from(is_operator(&token)),
        }
        if operators > MAX_OPERATORS {
            let does = format!("has more than {MAX_OPERATORS} operators in one place");
            return too_costly(span.start_line, does);
        }
        if branches > MAX_BRANCHES {
            return too_costly(span.start_line, format!("has more than {MAX_BRANCHES} `elif`"));
        }
    }
    let Ok(template) = parse(source, name, syntax, WhitespaceConfig::default()) else {
        return Ok(());
    };
    let mut constants = Constants::default();
    constants.add_statement(&template);
    if constants.bytes > MAX_CONSTANTS {
        let does = format!("makes constants of more than {MAX_CONSTANTS} bytes");
        return too_costly(constants.line, does);
    }
    Ok(())
}

/// Whether a token adds to the depth of an expression.
fn is_operator(token: &Token<'_>) -> bool {
    match token {
        Token::Ident(word) => matches!(*word, "and" | "or" | "not" | "in" | "is" | "if"),
        Token::TemplateData(_) | Token::VariableEnd | Token::BlockEnd => false,
        Token::Str(_) | Token::String(_) | Token::Comma | Token::Colon | Token::Assign => false,
        Token::Int(_) | Token::Int128(_) | Token::Float(_) => false,
        Token::BracketClose | Token::ParenClose | Token::BraceClose => false,
        _ => true,
    }
}

/// Total size of the constants that the compiler computes from others.
#[derive(Default)]
struct Constants {
    bytes: usize,
    /// Line of the constant with which the limit was exceeded.
    line: u16,
}

impl Constants {
    fn add_statement(&mut self, statement: &Stmt<'_>) {
        let (expressions, bodies) = parts(statement);
        for expression in expressions {
            self.add(expression);
        }
        for inner in bodies.into_iter().flatten() {
            self.add_statement(inner);
        }
    }

    /// Counts the constants computed within an expression. Returns its own value, if it is constant.
    fn add(&mut self, expression: &Expr<'_>) -> Option<Constant> {
        let operands: Vec<Option<Constant>> =
            operands(expression).into_iter().map(|operand| self.add(operand)).collect();
        let bytes = |operands: &[Option<Constant>]| -> Option<usize> {
            operands.iter().map(|operand| operand.as_ref().map(Constant::bytes)).sum()
        };
        let made = match (expression, &operands[..]) {
            (Expr::Const(constant), _) => return Some(Constant::of(constant.value.clone())),
            (Expr::BinOp(operation), [Some(left), Some(right)]) => {
                match (operation.op, left, right) {
                    (_, Constant::Number(_), Constant::Number(_)) => {
                        // Numbers are small, and so are results of operations on them.
                        return expression.as_const().map(Constant::of);
                    }
                    (BinOpKind::Mul, Constant::Number(times), Constant::Bytes(bytes))
                    | (BinOpKind::Mul, Constant::Bytes(bytes), Constant::Number(times)) => {
                        bytes.saturating_mul(times.as_usize().unwrap_or(0))
                    }
                    (_, left, right) => left.bytes().saturating_add(right.bytes()),
                }
            }
            (Expr::List(_) | Expr::Map(_) | Expr::UnaryOp(_) | Expr::Compare(_), operands) => {
                bytes(operands)?
            }
            _ => return None,
        };
        if self.bytes <= MAX_CONSTANTS {
            self.bytes = self.bytes.saturating_add(made);
            self.line = expression.span().start_line;
        }
        Some(Constant::Bytes(made))
    }
}

/// The value of a constant expression.
enum Constant {
    /// None, a boolean or a number.
    Number(Value),
    /// A string, list or dict of this size.
    Bytes(usize),
}

impl Constant {
    fn of(value: Value) -> Self {
        match value.kind() {
            ValueKind::Number | ValueKind::Bool | ValueKind::None | ValueKind::Undefined => {
                Self::Number(value)
            }
            _ => Self::Bytes(size(&value)),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Number(value) => size(value),
            Self::Bytes(bytes) => *bytes,
        }
    }
}

/// The expressions of a statement, and the statements nested in it.
fn parts<'a, 's>(statement: &'a Stmt<'s>) -> (Vec<&'a Expr<'s>>, Vec<&'a [Stmt<'s>]>) {
    match statement {
        Stmt::Template(it) => (vec![], vec![&it.children]),
        Stmt::EmitExpr(it) => (vec![&it.expr], vec![]),
        Stmt::ForLoop(it) => {
            let expressions = [&it.target, &it.iter].into_iter().chain(&it.filter_expr);
            (expressions.collect(), vec![&it.body, &it.else_body])
        }
        Stmt::IfCond(it) => (vec![&it.expr], vec![&it.true_body, &it.false_body]),
        Stmt::WithBlock(it) => {
            let assigned = it.assignments.iter().flat_map(|(target, value)| [target, value]);
            (assigned.collect(), vec![&it.body])
        }
        Stmt::Set(it) => (vec![&it.target, &it.expr], vec![]),
        Stmt::SetBlock(it) => {
            ([&it.target].into_iter().chain(&it.filter).collect(), vec![&it.body])
        }
        Stmt::AutoEscape(it) => (vec![&it.enabled], vec![&it.body]),
        Stmt::FilterBlock(it) => (vec![&it.filter], vec![&it.body]),
        Stmt::Block(it) => (vec![], vec![&it.body]),
        Stmt::Import(it) => (vec![&it.expr, &it.name], vec![]),
        Stmt::FromImport(it) => (vec![&it.expr], vec![]),
        Stmt::Extends(it) => (vec![&it.name], vec![]),
        Stmt::Include(it) => (vec![&it.name], vec![]),
        Stmt::Macro(it) => (it.args.iter().chain(&it.defaults).collect(), vec![&it.body]),
        Stmt::CallBlock(it) => {
            let within = &it.macro_decl;
            let arguments = it.call.args.iter().map(argument);
            let defaults = within.args.iter().chain(&within.defaults);
            (
                [&it.call.expr].into_iter().chain(arguments).chain(defaults).collect(),
                vec![&within.body],
            )
        }
        Stmt::Do(it) => {
            ([&it.call.expr].into_iter().chain(it.call.args.iter().map(argument)).collect(), vec![])
        }
        Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => (vec![], vec![]),
    }
}

/// The operands of an expression.
fn operands<'a, 's>(expression: &'a Expr<'s>) -> Vec<&'a Expr<'s>> {
    let called = |on: Option<&'a Expr<'s>>, arguments: &'a [CallArg<'s>]| {
        on.into_iter().chain(arguments.iter().map(argument)).collect()
    };
    match expression {
        Expr::Var(_) | Expr::Const(_) => vec![],
        Expr::Slice(it) => {
            let bounds = [&it.start, &it.stop, &it.step].into_iter().flatten();
            [&it.expr].into_iter().chain(bounds).collect()
        }
        Expr::UnaryOp(it) => vec![&it.expr],
        Expr::BinOp(it) => vec![&it.left, &it.right],
        Expr::Compare(it) => {
            [&it.expr].into_iter().chain(it.ops.iter().map(|op| &op.expr)).collect()
        }
        Expr::IfExpr(it) => {
            [&it.test_expr, &it.true_expr].into_iter().chain(&it.false_expr).collect()
        }
        Expr::Filter(it) => called(it.expr.as_ref(), &it.args),
        Expr::Test(it) => called(Some(&it.expr), &it.args),
        Expr::GetAttr(it) => vec![&it.expr],
        Expr::GetItem(it) => vec![&it.expr, &it.subscript_expr],
        Expr::Call(it) => called(Some(&it.expr), &it.args),
        Expr::List(it) => it.items.iter().collect(),
        Expr::Map(it) => it.keys.iter().chain(&it.values).collect(),
    }
}

fn argument<'a, 's>(argument: &'a CallArg<'s>) -> &'a Expr<'s> {
    let (CallArg::Pos(value)
    | CallArg::Kwarg(_, value)
    | CallArg::PosSplat(value)
    | CallArg::KwargSplat(value)) = argument;
    value
}

#[cfg(test)]
mod tests {
    use super::super::chat::ChatTemplate;
    use super::*;

    fn compiled(source: &str) -> Result<(), TextError> {
        ChatTemplate::from_source(source, None, None).map(drop)
    }

    /// A template that repeats a piece.
    fn with(start: &str, piece: &str, times: usize, end: &str) -> String {
        [start, &piece.repeat(times), end].concat()
    }

    const CHAINS: [[&str; 3]; 16] = [
        ["{{ 'a'", " + 'a'", " }}"],
        ["{{ x", " ~ 'a'", " }}"],
        ["{{ x", " * 2", " }}"],
        ["{{ x", ".y", " }}"],
        ["{{ x", "[0]", " }}"],
        ["{{ x", "()", " }}"],
        ["{{ x", "|trim", " }}"],
        ["{{ x", " is defined", " }}"],
        ["{{ x", " and y", " }}"],
        ["{{ x", " or y", " }}"],
        ["{{ x", " < 1", " }}"],
        ["{{ x", " in y", " }}"],
        ["{{ x", " if x else y", " }}"],
        ["{{", " not", " x }}"],
        ["{{ x", " ** 2", " }}"],
        ["{% if x %}", "{% elif x %}", "{% endif %}"],
    ];

    #[test]
    fn long_chains_are_refused_before_they_are_compiled() {
        for [start, piece, end] in CHAINS {
            for times in [100_000, 1000] {
                let error = compiled(&with(start, piece, times, end)).unwrap_err();
                let text = error.to_string();
                assert!(text.contains("500") || text.contains("recursion"), "{piece}: {text}");
            }
        }
    }

    #[test]
    fn the_longest_chains_fit_the_stack_of_a_thread() {
        for [start, piece, end] in CHAINS {
            let source = with(start, piece, MAX_OPERATORS.min(MAX_BRANCHES), end);
            // The default stack size of threads.
            let thread = std::thread::Builder::new().stack_size(2 << 20);
            let compiled = thread.spawn(move || compiled(&source)).unwrap().join().unwrap();
            // The parser limits its own recursion.
            let refused = compiled.err().map(|error| error.to_string());
            assert!(refused.is_none_or(|error| error.contains("recursion")), "{piece}");
        }
    }

    #[test]
    fn large_constants_are_refused_before_they_are_made() {
        let sources = [
            "{% set s = 'ab' * 50000000 %}",
            "{% set s = ('ab' * 1000) * 1000 %}",
            "{{ 1000000 * ('ab' ~ 'cd') }}",
            "{{ x if y else [1, 2] * (1000 * 1000) }}",
            "{% for m in messages %}{{ m['a' * 2 ** 21] }}{% endfor %}",
            "{% macro f(a='a' * 2000000) %}{% endmacro %}",
            "{{ x | default('a' * 2000000) }}",
            "{{ f(a='a' * 2000000) }}",
            "{% set ns = namespace(a=not ('a' * 2000000)) %}",
        ];
        for source in sources {
            let error = compiled(source).unwrap_err().to_string();
            assert!(error.contains("constants") && error.contains("chat_template:1"), "{error}");
        }
    }

    #[test]
    fn usual_constants_are_accepted() {
        let sources = [
            "{{ '=' * 80 ~ '\\n' }}",
            "{% set days = 86400000 * 365 %}{{ 'a' if x * 100000000 > y }}",
            "{% set roles = ['user', 'assistant', {'a': 1}] %}",
        ];
        for source in sources {
            compiled(source).unwrap();
        }
    }
}
