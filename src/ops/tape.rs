//! Which backward function belongs to which tensor.
//!
//! Candle keeps the operation that made a tensor to itself, so a backward pass of our own (`backward`) finds it here, by
//! the tensor's id. The table never keeps a graph alive: an operation is owned by the tensor that it made, and leaves the
//! table with it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, Weak};

use candle_core::{Result, Shape, Tensor, TensorId};

/// Gradients of the inputs, in their order; `None` for an input that needs none.
pub type InputGradients = Vec<Option<Tensor>>;

/// From the inputs, the output and the gradient of the output. What it returns is new memory, the gradient that it was
/// given, or views of these.
pub type BackwardFn = dyn Fn(&[&Tensor], &Tensor, &Tensor) -> Result<InputGradients> + Send + Sync;

/// An operation that was applied.
pub struct Node {
    pub name: &'static str,
    pub inputs: Vec<Tensor>,
    pub backward: Box<BackwardFn>,
    /// Its entries in the table: the output, and the output in other shapes.
    outputs: Mutex<Vec<TensorId>>,
}

/// Where a tensor comes from.
pub enum Origin {
    Operation(Arc<Node>),
    /// The values of another tensor, whose shape was this.
    Reshape(TensorId, Shape),
}

/// A reshape shares the memory of the operation's output, and dies before it.
enum Entry {
    Operation(Weak<Node>),
    Reshape { from: TensorId, from_shape: Shape, base: Weak<Node> },
}

static TABLE: LazyLock<Mutex<HashMap<TensorId, Entry>>> = LazyLock::new(Mutex::default);

fn table() -> MutexGuard<'static, HashMap<TensorId, Entry>> {
    TABLE.lock().expect("no panic while held")
}

impl Node {
    pub fn new(name: &'static str, inputs: &[&Tensor], backward: Box<BackwardFn>) -> Arc<Self> {
        let inputs = inputs.iter().map(|&input| input.clone()).collect();
        Arc::new(Self { name, inputs, backward, outputs: Mutex::default() })
    }

    fn enter(&self, id: TensorId, entry: Entry) {
        table().insert(id, entry);
        self.outputs.lock().expect("no panic while held").push(id);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let mut table = table();
        for id in self.outputs.get_mut().expect("no panic while held") {
            table.remove(id);
        }
    }
}

/// Enters `output` as made by `node`, which the output must own.
pub fn record(node: &Arc<Node>, output: &Tensor) {
    node.enter(output.id(), Entry::Operation(Arc::downgrade(node)));
}

/// Enters `output` as `input` in another shape, sharing its memory. False if the table does not know `input`.
pub fn record_reshape(input: &Tensor, output: &Tensor) -> bool {
    let base = match table().get(&input.id()) {
        Some(Entry::Operation(base) | Entry::Reshape { base, .. }) => base.clone(),
        None => return false,
    };
    // Upgraded when the table is free again: the last owner of a node needs it.
    let Some(node) = base.upgrade() else { return false };
    node.enter(output.id(), Entry::Reshape { from: input.id(), from_shape: input.shape().clone(), base });
    true
}

/// None: a variable, a constant, or the result of an operation that is not ours.
pub fn origin(id: TensorId) -> Option<Origin> {
    match table().get(&id)? {
        Entry::Operation(node) => node.upgrade().map(Origin::Operation),
        Entry::Reshape { from, from_shape, .. } => Some(Origin::Reshape(*from, from_shape.clone())),
    }
}

thread_local! {
    /// Tensors that kernels made since the innermost [`watch`] began.
    static MADE: RefCell<Option<Vec<TensorId>>> = const { RefCell::new(None) };
}

/// Says that `tensor` is new memory of its own.
pub fn note_made(tensor: &Tensor) {
    MADE.with_borrow_mut(|made| made.iter_mut().for_each(|made| made.push(tensor.id())));
}

/// The result of `f`, and the tensors of new memory that kernels made on this thread meanwhile.
pub fn watch<R>(f: impl FnOnce() -> R) -> (R, Vec<TensorId>) {
    let outer = MADE.replace(Some(Vec::new()));
    let result = f();
    (result, MADE.replace(outer).unwrap_or_default())
}
