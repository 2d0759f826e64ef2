//! What was seen: one trie of path segments per service. Words are children of their own; segments of a
//! certain shape share one child, the parameter. Nothing is decided here.
//!
//! Bounds per service: [`MAX_NODES`] nodes of about 120 bytes, [`MAX_CHILDREN`] children of a node. At either bound a new
//! word is counted ([`Evidence::absorbed`]) and no more; what is below it is added to the node's parameter, where
//! there is one. So many words are enough to decide on.

use rustc_hash::FxHashMap;

use super::shape::Shape;

/// Most nodes of one service.
pub const MAX_NODES: usize = 16_384;
/// Most words that are told apart below one node.
pub const MAX_CHILDREN: usize = 512;
/// Most segments of a path that are looked at.
pub const MAX_SEGMENTS: usize = 24;
/// Most versions that one node can tell apart.
pub const MAX_VERSIONS: usize = 5;
/// No node.
pub const NONE: u32 = u32::MAX;

/// Who and what brought a path, as far as the decision asks for it.
#[derive(Debug, Clone, Copy)]
pub struct Witness {
    /// Hash of the principal, else of the client's address.
    pub who: u32,
    /// Size of the answer, bytes (saturating).
    pub size: u32,
    /// The request carried a credential.
    pub authenticated: bool,
    /// ns since the epoch.
    pub now: u64,
}

/// A segment below its parent.
#[derive(Debug, Clone)]
pub struct Node {
    /// Words.
    pub children: FxHashMap<Box<str>, u32>,
    /// Where segments of a certain shape go; [`NONE`] where none was seen.
    pub parameter: u32,
    /// The node above; [`NONE`] for the root.
    pub parent: u32,
    /// Paths that went through or ended here.
    pub count: u32,
    /// Bit set of the [`Shape`]s that came here, for a parameter.
    pub shapes: u16,
    /// New words below it that found no place, but for those of callers that brought too many.
    pub overflow: u32,
    /// Who came first.
    pub first: Witness,
}

/// All that was seen of one service.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// Node 0 is the root.
    pub nodes: Vec<Node>,
    /// Words that found no place and were counted as parameters.
    pub absorbed: u64,
}

impl Evidence {
    /// Nothing yet.
    #[must_use]
    pub fn new(now: u64) -> Self {
        let first = Witness { who: 0, size: 0, authenticated: false, now };
        Self { nodes: vec![Node::new(NONE, first)], absorbed: 0 }
    }

    /// Adds one path; returns the node where it ends, and how many words were new. Without `may_add` new words
    /// are treated as beyond the bounds.
    pub fn add(&mut self, path: &str, witness: Witness, may_add: bool) -> (u32, u32) {
        let (mut at, mut new) = (0, 0);
        self.count(at, 1);
        for segment in super::segments(path).take(MAX_SEGMENTS) {
            // The shape of a word that is known does not matter, and it costs more than the look-up.
            at = match self.nodes.get(at as usize).and_then(|node| node.children.get(segment)) {
                Some(&known) => known,
                None => self.descend(at, segment, Shape::of(segment), witness, may_add, &mut new),
            };
            self.count(at, 1);
        }
        (at, new)
    }

    /// Adds `n` more of the path that ends at a node.
    pub fn again(&mut self, end: u32, n: u32) {
        let mut at = end;
        while let Some(node) = self.nodes.get_mut(at as usize) {
            node.count = node.count.saturating_add(n);
            at = node.parent;
        }
    }

    /// Sets what a node had before a restart.
    pub fn set(&mut self, at: u32, count: u32, shapes: u16) {
        if let Some(node) = self.nodes.get_mut(at as usize) {
            node.count = count;
            node.shapes = shapes;
        }
    }

    /// The word below a node, or its parameter; made when it is not there.
    pub fn child(&mut self, at: u32, word: Option<&str>) -> u32 {
        let Some(node) = self.nodes.get(at as usize) else { return at };
        let known = match word {
            Some(word) => node.children.get(word).copied(),
            None => Some(node.parameter).filter(|&p| p != NONE),
        };
        if let Some(known) = known {
            return known;
        }
        let child = self.push(at, node.first);
        if let Some(node) = self.nodes.get_mut(at as usize) {
            match word {
                Some(word) => {
                    node.children.insert(word.into(), child);
                }
                None => node.parameter = child,
            }
        }
        child
    }

    fn count(&mut self, at: u32, n: u32) {
        if let Some(node) = self.nodes.get_mut(at as usize) {
            node.count = node.count.saturating_add(n);
        }
    }

    /// The node for a segment that is no known word below `at`.
    fn descend(&mut self, at: u32, segment: &str, shape: Shape, witness: Witness, may_add: bool, new: &mut u32) -> u32 {
        let full = !may_add || self.nodes.len() >= MAX_NODES;
        let Some(node) = self.nodes.get(at as usize) else { return at };
        if shape == Shape::Word || may_be_version(node, segment, shape) {
            if !full && node.children.len() < MAX_CHILDREN {
                *new += 1;
                let child = self.push(at, witness);
                if let Some(node) = self.nodes.get_mut(at as usize) {
                    node.children.insert(segment.into(), child);
                }
                return child;
            }
            // A scanner's words must not make a parameter where there is none.
            self.absorbed += 1;
            let parameter = node.parameter;
            if may_add && let Some(node) = self.nodes.get_mut(at as usize) {
                node.overflow = node.overflow.saturating_add(1);
            }
            return if parameter == NONE { at } else { parameter };
        }
        let parameter = node.parameter;
        let parameter = match parameter {
            // The bound is exceeded by the parameters themselves at most.
            NONE if self.nodes.len() >= 2 * MAX_NODES => return at,
            NONE => {
                *new += 1;
                let child = self.push(at, witness);
                if let Some(node) = self.nodes.get_mut(at as usize) {
                    node.parameter = child;
                }
                child
            }
            known => known,
        };
        if let Some(node) = self.nodes.get_mut(parameter as usize) {
            node.shapes |= 1 << shape as u16;
        }
        parameter
    }

    fn push(&mut self, parent: u32, first: Witness) -> u32 {
        self.nodes.push(Node::new(parent, first));
        u32::try_from(self.nodes.len() - 1).unwrap_or(NONE)
    }
}

impl Node {
    fn new(parent: u32, first: Witness) -> Self {
        Self { children: FxHashMap::default(), parameter: NONE, parent, count: 0, shapes: 0, overflow: 0, first }
    }
}

/// One digit or a date may name a version (`/api/2/issues`, `/2010-04-01/Accounts`, `/2024-04/orders`): the first few below a node
/// are told apart, and `decide` says what they are.
fn may_be_version(node: &Node, segment: &str, shape: Shape) -> bool {
    let usual = match shape {
        Shape::Int => segment.len() == 1,
        Shape::Date => matches!(segment.len(), 7 | 10),
        _ => false,
    };
    usual
        && node.parameter == NONE
        && node.children.keys().filter(|k| Shape::of(k) != Shape::Word).count() < MAX_VERSIONS
}
