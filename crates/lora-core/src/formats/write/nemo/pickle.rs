//! The pickle of a state dict as `torch.save` writes it: protocol 2, with references to storages, which are
//! separate entries of the zip file.

use crate::device::DType;

/// A tensor of the state dict. Its storage has the number of its position.
pub(super) struct Described<'a> {
    pub name: &'a str,
    pub dtype: DType,
    pub shape: &'a [usize],
}

// Opcodes of Python's pickle machine, with their names in `pickletools`.
const PROTO: u8 = 0x80;
const MARK: u8 = b'(';
const STOP: u8 = b'.';
const GLOBAL: u8 = b'c';
const REDUCE: u8 = b'R';
const BINUNICODE: u8 = b'X';
const BINPERSID: u8 = b'Q';
const BININT: u8 = b'J';
const LONG1: u8 = 0x8a;
const EMPTY_TUPLE: u8 = b')';
const TUPLE: u8 = b't';
const EMPTY_DICT: u8 = b'}';
const SETITEMS: u8 = b'u';
const NEWFALSE: u8 = 0x89;

/// A program that builds a dict of these tensors.
pub(super) fn state_dict(tensors: &[Described<'_>]) -> Vec<u8> {
    let mut program = Program(vec![PROTO, 2, EMPTY_DICT, MARK]);
    for (storage, tensor) in tensors.iter().enumerate() {
        program.text(tensor.name);
        program.tensor(tensor, storage);
    }
    program.0.extend([SETITEMS, STOP]);
    program.0
}

struct Program(Vec<u8>);

impl Program {
    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)`.
    fn tensor(&mut self, tensor: &Described<'_>, storage: usize) {
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.0.push(MARK);
        self.storage(tensor, storage);
        self.whole(0);
        self.extents(tensor.shape.iter().copied());
        let after = |axis: usize| tensor.shape[axis + 1..].iter().product();
        self.extents((0..tensor.shape.len()).map(after));
        self.0.push(NEWFALSE);
        self.global("collections", "OrderedDict");
        self.0.extend([EMPTY_TUPLE, REDUCE, TUPLE, REDUCE]);
    }

    /// The storage, by its persistent id: `("storage", class, key, device, elements)`.
    fn storage(&mut self, tensor: &Described<'_>, storage: usize) {
        self.0.push(MARK);
        self.text("storage");
        let class = match tensor.dtype {
            DType::F32 => "FloatStorage",
            DType::F16 => "HalfStorage",
            DType::Bf16 => "BFloat16Storage",
            DType::I32 => "IntStorage",
            DType::F8E4m3 => "Float8_e4m3fnStorage",
        };
        self.global("torch", class);
        self.text(&storage.to_string());
        self.text("cpu");
        self.whole(tensor.shape.iter().product());
        self.0.extend([TUPLE, BINPERSID]);
    }

    fn extents(&mut self, extents: impl Iterator<Item = usize>) {
        self.0.push(MARK);
        extents.for_each(|extent| self.whole(extent));
        self.0.push(TUPLE);
    }

    fn global(&mut self, module: &str, name: &str) {
        self.0.push(GLOBAL);
        self.0.extend(format!("{module}\n{name}\n").bytes());
    }

    fn text(&mut self, text: &str) {
        self.0.push(BINUNICODE);
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.bytes());
    }

    fn whole(&mut self, value: usize) {
        match i32::try_from(value) {
            Ok(value) => {
                self.0.push(BININT);
                self.0.extend(value.to_le_bytes());
            }
            Err(_) => {
                // One byte more than the value needs, so that its sign bit is clear.
                self.0.extend([LONG1, 9]);
                self.0.extend((value as u64).to_le_bytes());
                self.0.push(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_a_call_on_a_storage_by_number() {
        let tensor = Described { name: "w", dtype: DType::Bf16, shape: &[2, 3] };
        let program = state_dict(&[tensor]);
        let has = |part: &[u8]| program.windows(part.len()).any(|window| window == part);
        assert!(has(b"ctorch._utils\n_rebuild_tensor_v2\n(") && has(b"ctorch\nBFloat16Storage\n"));
        // Size (2, 3) and stride (3, 1).
        assert!(has(b"(J\x02\0\0\0J\x03\0\0\0t(J\x03\0\0\0J\x01\0\0\0t\x89"));
        assert_eq!((program[..2].to_vec(), program.last()), (vec![0x80, 2], Some(&b'.')));
    }

    #[test]
    fn numbers_of_any_size_are_positive() {
        let mut program = Program(Vec::new());
        program.whole(1 << 31);
        assert_eq!(program.0, [0x8a, 9, 0, 0, 0, 0x80, 0, 0, 0, 0, 0]);
    }
}
