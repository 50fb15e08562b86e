//! The prefix tree: which KV blocks hold which tokens, so that equal prefixes are computed once.
//!
//! Nodes are blocks, and a path from a root spells a prefix, one block of tokens after another. Each
//! adapter has its own root, identified by the hash of its content, and so has the base model: keys and
//! values computed with one adapter are never reused for another. Lookups compare the tokens themselves,
//! not only their hashes.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};

use lora_core::Generation;

use super::pool::BlockId;

/// Root of a sequence's prefixes: the content of its adapter, on which keys and values depend besides the
/// tokens; `None` for the base model.
pub type Root = Option<Generation>;

/// The node before a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Parent {
    Root(Root),
    Block(BlockId),
}

#[derive(Debug)]
struct Node {
    parent: Parent,
    /// Tokens in the block; fewer than `tokens_per_block` in a partly filled leaf.
    tokens: Box<[u32]>,
    children: Vec<BlockId>,
    /// [`PrefixTree::clock`] of the last use.
    used: u64,
    /// Whether a sequence holds the block.
    held: bool,
}

/// The longest known prefix of a sequence.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Match {
    /// Fully matched blocks, in order.
    pub blocks: Vec<BlockId>,
    /// A block of which the first tokens come next, and how many tokens match.
    pub partial: Option<(BlockId, usize)>,
}

/// The tree of known prefixes, with LRU eviction of leaves that no sequence holds.
#[derive(Debug)]
pub struct PrefixTree {
    nodes: HashMap<BlockId, Node>,
    /// Full blocks by parent and hash of their tokens.
    by_tokens: HashMap<(Parent, u64), BlockId>,
    /// Blocks directly below each root.
    firsts: HashMap<Root, Vec<BlockId>>,
    /// Leaves that no sequence holds, least recently used first.
    evictable: BTreeSet<(u64, BlockId)>,
    /// Number of blocks that no sequence holds.
    unheld: usize,
    /// Counts insertions and releases, for LRU order.
    clock: u64,
    hasher: RandomState,
    tokens_per_block: usize,
}

impl PrefixTree {
    /// An empty tree.
    pub fn new(tokens_per_block: usize) -> Self {
        Self {
            nodes: HashMap::new(),
            by_tokens: HashMap::new(),
            firsts: HashMap::new(),
            evictable: BTreeSet::new(),
            unheld: 0,
            clock: 0,
            hasher: RandomState::new(),
            tokens_per_block,
        }
    }

    /// Number of blocks in the tree that no sequence holds.
    pub fn unheld(&self) -> usize {
        self.unheld
    }

    /// Whether a block is in the tree.
    pub fn contains(&self, block: BlockId) -> bool {
        self.nodes.contains_key(&block)
    }

    /// The longest prefix of `tokens` in the tree under `root`. With `partial`, the last block may match in
    /// part.
    pub fn find(&self, root: Root, tokens: &[u32], partial: bool) -> Match {
        let mut found = Match::default();
        let mut parent = Parent::Root(root);
        let mut chunks = tokens.chunks(self.tokens_per_block);
        for chunk in chunks.by_ref() {
            if let Some(block) = self.child(parent, chunk) {
                found.blocks.push(block);
                parent = Parent::Block(block);
                continue;
            }
            if partial {
                found.partial = self.partial_child(parent, chunk);
            }
            break;
        }
        found
    }

    /// Adds `block`, a full block that holds `tokens` and follows `before` (`None`: the first block). If the
    /// tree already has a block with the same contents, returns that one and adds nothing.
    ///
    /// The caller must hold both `block` and `before`.
    pub fn insert(
        &mut self,
        root: Root,
        before: Option<BlockId>,
        tokens: &[u32],
        block: BlockId,
    ) -> Option<BlockId> {
        let parent = before.map_or(Parent::Root(root), Parent::Block);
        if let Some(twin) = self.child(parent, tokens) {
            return Some(twin);
        }
        self.by_tokens.insert((parent, self.hasher.hash_one(tokens)), block);
        self.add(parent, tokens, block);
        None
    }

    /// Adds a partly filled block as a leaf, unless a block that begins with the same tokens is there.
    pub fn insert_partial(
        &mut self,
        root: Root,
        before: Option<BlockId>,
        tokens: &[u32],
        block: BlockId,
    ) {
        let parent = before.map_or(Parent::Root(root), Parent::Block);
        let known = self.partial_child(parent, tokens);
        if known.is_none_or(|(_, common)| common < tokens.len()) {
            self.add(parent, tokens, block);
        }
    }

    fn add(&mut self, parent: Parent, tokens: &[u32], block: BlockId) {
        self.clock += 1;
        match parent {
            Parent::Root(root) => self.firsts.entry(root).or_default().push(block),
            Parent::Block(id) => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.children.push(block);
                }
            }
        }
        let node = Node {
            parent,
            tokens: tokens.into(),
            children: Vec::new(),
            used: self.clock,
            held: true,
        };
        self.nodes.insert(block, node);
    }

    /// Marks a block as held by a sequence, so that it is not evicted.
    pub fn hold(&mut self, block: BlockId) {
        let Some(node) = self.nodes.get_mut(&block) else { return };
        if !std::mem::replace(&mut node.held, true) {
            self.unheld -= 1;
            self.evictable.remove(&(node.used, block));
        }
    }

    /// Marks a block as held by no sequence, so that it may be evicted. A sequence's last block must be
    /// released first, so that children are never held longer than their parents.
    pub fn release(&mut self, block: BlockId) {
        let Some(node) = self.nodes.get_mut(&block) else { return };
        self.clock += 1;
        node.held = false;
        node.used = self.clock;
        self.unheld += 1;
        if node.children.is_empty() {
            self.evictable.insert((node.used, block));
        }
    }

    /// Removes the least recently used leaf that no sequence holds, and returns its block.
    pub fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.evictable.pop_first()?;
        self.remove(block);
        self.unheld -= 1;
        Some(block)
    }

    fn remove(&mut self, block: BlockId) {
        let Some(node) = self.nodes.remove(&block) else { return };
        let key = (node.parent, self.hasher.hash_one(&*node.tokens));
        if self.by_tokens.get(&key) == Some(&block) {
            self.by_tokens.remove(&key);
        }
        match node.parent {
            Parent::Root(root) => {
                if let Some(firsts) = self.firsts.get_mut(&root) {
                    firsts.retain(|first| *first != block);
                    if firsts.is_empty() {
                        self.firsts.remove(&root);
                    }
                }
            }
            Parent::Block(id) => {
                let Some(parent) = self.nodes.get_mut(&id) else { return };
                parent.children.retain(|child| *child != block);
                if parent.children.is_empty() && !parent.held {
                    self.evictable.insert((parent.used, id));
                }
            }
        }
    }

    /// The child of `parent` that holds exactly `tokens`, a full block.
    fn child(&self, parent: Parent, tokens: &[u32]) -> Option<BlockId> {
        let block = *self.by_tokens.get(&(parent, self.hasher.hash_one(tokens)))?;
        (*self.nodes.get(&block)?.tokens == *tokens).then_some(block)
    }

    /// The child of `parent` with the longest common prefix with `tokens`, and its length.
    fn partial_child(&self, parent: Parent, tokens: &[u32]) -> Option<(BlockId, usize)> {
        let children = match parent {
            Parent::Root(root) => self.firsts.get(&root)?,
            Parent::Block(id) => &self.nodes.get(&id)?.children,
        };
        let common = |block: &BlockId| {
            let known = self.nodes.get(block).map_or(&[][..], |node| &node.tokens);
            known.iter().zip(tokens).take_while(|(a, b)| a == b).count()
        };
        let best = children.iter().map(|block| (*block, common(block)));
        best.filter(|(_, count)| *count > 0).max_by_key(|(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAPTER: Root = Some(Generation([1; 32]));

    /// A tree with the blocks 0 and 1 for the tokens 0 to 3 of the base model.
    fn tree() -> PrefixTree {
        let mut tree = PrefixTree::new(2);
        assert_eq!(tree.insert(None, None, &[0, 1], 0), None);
        assert_eq!(tree.insert(None, Some(0), &[2, 3], 1), None);
        tree
    }

    #[test]
    fn a_prefix_is_found_under_its_adapter_only() {
        let tree = tree();
        let found = tree.find(None, &[0, 1, 2, 3, 4], true);
        assert_eq!(found, Match { blocks: vec![0, 1], partial: None });
        assert_eq!(tree.find(ADAPTER, &[0, 1, 2, 3], true), Match::default());
    }

    #[test]
    fn a_block_matches_partly_as_far_as_its_tokens_agree() {
        let tree = tree();
        let found = tree.find(None, &[0, 1, 2, 9], true);
        assert_eq!(found, Match { blocks: vec![0], partial: Some((1, 1)) });
        assert_eq!(tree.find(None, &[0, 1, 2, 9], false).partial, None);
        assert_eq!(tree.find(None, &[0], true).partial, Some((0, 1)));
    }

    #[test]
    fn equal_blocks_are_kept_once() {
        let mut tree = tree();
        assert_eq!(tree.insert(None, Some(0), &[2, 3], 7), Some(1));
        assert!(!tree.contains(7));
    }

    #[test]
    fn leaves_are_evicted_before_their_parents_and_held_blocks_never() {
        let mut tree = tree();
        assert_eq!(tree.evict(), None);
        tree.release(1);
        tree.release(0);
        assert_eq!(tree.unheld(), 2);
        tree.hold(0);
        assert_eq!((tree.evict(), tree.evict()), (Some(1), None));
        tree.release(0);
        assert_eq!((tree.evict(), tree.unheld()), (Some(0), 0));
        assert_eq!(tree.find(None, &[0, 1], true), Match::default());
    }
}
