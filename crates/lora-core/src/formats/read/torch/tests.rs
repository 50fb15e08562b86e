//! Pickles that torch writes, and pickles that it does not write.

use candle_core::pickle::Object;
use proptest::prelude::*;

use super::Problem;
use super::unpickle::unpickle;

fn int(value: i32) -> Object {
    Object::Int(value)
}

fn problem(program: &[u8]) -> String {
    match unpickle(program) {
        Err(Problem::Invalid(problem)) => problem,
        other => panic!("{program:?} gives {other:?}"),
    }
}

fn forbidden(program: &[u8]) -> String {
    match unpickle(program) {
        Err(Problem::Forbidden(global)) => global,
        other => panic!("{program:?} gives {other:?}"),
    }
}

#[test]
fn values_are_made_as_python_makes_them() {
    let program = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x07X\x01\x00\x00\x00b(h\x01Nttu.";
    let Err(Problem::Invalid(uneven)) = unpickle(program) else { panic!("the mark is spent") };
    assert!(uneven.contains("mark"), "{uneven}");
    let program = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x07X\x01\x00\x00\x00b(h\x01Ntu.";
    let Ok(Object::Dict(mut items)) = unpickle(program) else { panic!("a dict") };
    items.reverse();
    let text = |text: &str| Object::Unicode(text.to_owned());
    let pair = Object::Tuple(vec![text("a"), Object::None]);
    assert_eq!(items, [(text("a"), int(7)), (text("b"), pair)]);
    let metadata = b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadata}sb.";
    assert!(matches!(unpickle(metadata), Ok(Object::Dict(items)) if items.len() == 1));
}

#[test]
fn a_forbidden_global_is_named_wherever_the_program_hides_it() {
    let programs: [&[u8]; 5] = [
        b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
        b"\x80\x02}cos\nsystem\n0.",
        b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\ns.",
        b"(ios\nsystem\n.",
        b"\x80\x04\x95\x16\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    ];
    for program in programs {
        assert_eq!(forbidden(program), "os.system", "{program:?}");
    }
    // After an unknown opcode the rest cannot be decoded, so none of it is run.
    assert!(problem(b"\x80\x02S'os'\n.").contains("0x53"));
    assert_eq!(forbidden(b"\x80\x02ctorch\nload\n."), "torch.load");
    assert_eq!(forbidden(b"\x80\x02c\xff\n\xff\n."), "(not a text).(not a text)");
}

#[test]
fn what_candle_runs_otherwise_than_python_is_refused() {
    let cases: [(&[u8], &str); 9] = [
        (b"\x80\x02(d.", "DICT"),
        (b"\x80\x02}}0.", "POP"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "OrderedDict"),
        (b"\x80\x02}}X\x01\x00\x00\x00aNsb.", "attributes"),
        (b"\x80\x02\x8a\x01\xff.", "negative"),
        (b"\x80\x02\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01.", "too large"),
        (b"\x80\x02}q\x00h\x00\x86.", "two places"),
        (b"\x80\x02NN.", "2 values"),
        (b"\x80\x02N.N", "after its end"),
    ];
    for (program, part) in cases {
        let problem = problem(program);
        assert!(problem.contains(part), "{program:?}: {problem}");
    }
}

#[test]
fn programs_that_would_exhaust_the_machine_are_stopped() {
    let deep = [&b"\x80\x02N"[..], &[0x85; 1 << 20], b"."].concat();
    assert!(problem(&deep).contains("deep"));
    // Each pair contains the one before it twice.
    let mut doubling = b"\x80\x02N".to_vec();
    for number in 0..30u8 {
        doubling.extend([b'q', number, b'h', number, 0x86]);
    }
    doubling.push(b'.');
    assert!(problem(&doubling).contains("more values"));
    let wide = [&b"\x80\x02("[..], &[b'N'; 1 << 20], b"t."].concat();
    assert!(problem(&wide).contains("more values"));
    assert!(problem(b"\x80\x02X\xff\xff\xff\xffabc").contains("within"));
    assert!(problem(b"").contains("no end"));
}

const TENSOR: &[u8] = b"\x80\x02}q\x00X\x01\x00\x00\x00tq\x01ctorch._utils\n_rebuild_tensor_v2\nq\
\x02((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\
\x00cpuq\x06K\x02tq\x07QK\x00K\x02\x85q\x08K\x01\x85q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0b\
tq\x0cRq\x0ds.";

/// Instructions that are all allowed, in whatever order.
const PIECES: [&[u8]; 25] = [
    b"N",
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"s",
    b"u",
    b"a",
    b"e",
    b"q\x00",
    b"h\x00",
    b"q\x01",
    b"h\x01",
    b"Q",
    b"R",
    b"b",
    b"K\x01",
    b"\x8a\x01\x05",
    b"ccollections\nOrderedDict\n",
    b"X\x01\x00\x00\x00a",
    b"X\x09\x00\x00\x00_metadata",
];

proptest! {
    #[test]
    fn any_program_gives_a_value_or_a_problem(
        pieces in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..40),
    ) {
        let _ = unpickle(&[b"\x80\x02", &pieces.concat()[..], b"."].concat());
    }

    #[test]
    fn a_damaged_program_gives_a_value_or_a_problem(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in 0..TENSOR.len(),
    ) {
        let mut program = TENSOR.to_vec();
        prop_assert!(unpickle(&program).is_ok());
        for (at, byte) in changes {
            program[at.index(TENSOR.len())] = byte;
        }
        let _ = unpickle(&program);
        let _ = unpickle(&program[..cut]);
    }
}
