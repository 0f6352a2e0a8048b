//! The backward pass: from a loss to the gradients of the variables that it depends on.
//!
//! Candle's own makes a tensor of zeros for every input of every operation and adds the gradient to it in a third tensor,
//! and keeps what it has used until the end. Here the first gradient of a tensor is taken as it is, further ones are added
//! in place, each is dropped as soon as it is used, and with it the activations that no operation ahead needs. Only
//! operations of `ops` can be followed (`tape`); one that is not ours is an error, never a lost gradient.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, hash_map::Entry};

use candle_core::{Device, Result, Tensor, TensorId, bail};

use super::elementwise::{add_in_place, sum};
use super::graft::on_cpu;
use super::ledger::note_operation;
use super::tape::{Node, Origin, origin, watch};

thread_local! {
    /// Gradients of variables that no operation of the graph has for an input: a checkpointed part's parameters.
    static LEFT: RefCell<Vec<(TensorId, Tensor)>> = const { RefCell::new(Vec::new()) };
}

/// For the pass under way on this thread: adds gradients that an operation's backward function found beside its inputs'.
pub fn leave_for_parameters(gradients: Gradients) {
    LEFT.with_borrow_mut(|left| left.extend(gradients.0.into_iter().map(|(id, gradient)| (id, gradient.tensor))));
}

/// Gradients of variables.
pub struct Gradients(HashMap<TensorId, Gradient>);

impl Gradients {
    /// None: the loss does not depend on this variable.
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.get(&variable.id()).map(|gradient| &gradient.tensor)
    }

    /// Takes the gradient out.
    pub fn remove(&mut self, variable: &Tensor) -> Option<Tensor> {
        self.0.remove(&variable.id()).map(|gradient| gradient.tensor)
    }

    /// Adds the gradients of another pass, in place where nobody else looks at the memory.
    pub fn add(&mut self, other: Self) -> Result<()> {
        other.0.into_iter().try_for_each(|(id, gradient)| add_to(&mut self.0, id, gradient))
    }

    /// Variables that have a gradient.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no variable has a gradient.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Gradients of the sum of `loss`. The history goes with it: keep no other handle on the loss, and each activation is
/// freed as the pass leaves it behind.
pub fn backward(loss: Tensor) -> Result<Gradients> {
    let ones = loss.ones_like()?.contiguous()?;
    backward_from(loss, ones)
}

/// Gradients of Σ gradient·output.
///
/// # Shapes
/// - gradient of the output's
pub fn backward_from(output: Tensor, gradient: Tensor) -> Result<Gradients> {
    if gradient.dims() != output.dims() {
        bail!("backward: gradient {:?} for an output {:?}", gradient.dims(), output.dims());
    }
    if !output.track_op() {
        bail!("backward: the loss depends on no variable");
    }
    match output.device() {
        Device::Cpu => walk(output, gradient, |_| note_operation()),
        // There the operations are compositions of Candle's, and so is the way back.
        _ => by_candle(&output, &gradient),
    }
}

/// Candle's backward pass, for the variables alone.
pub fn by_candle(output: &Tensor, gradient: &Tensor) -> Result<Gradients> {
    LEFT.take();
    let mut store = (output * gradient)?.sum_all()?.backward()?;
    let variables = output.sorted_nodes().into_iter().filter(|node| node.is_variable());
    // Detached: Candle's gradients can have a history of their own, which would keep the graph alive.
    let gradients = variables.filter_map(|node| Some((node.id(), store.remove(node)?.detach())));
    let gradients = gradients.map(|(id, tensor)| (id, Gradient { tensor, is_own: false }));
    let mut gradients: HashMap<TensorId, Gradient> = gradients.collect();
    for (id, tensor) in LEFT.take() {
        add_to(&mut gradients, id, Gradient { tensor, is_own: false })?;
    }
    Ok(Gradients(gradients))
}

/// `observe` learns after each operation how many gradients are held.
pub fn walk(output: Tensor, gradient: Tensor, mut observe: impl FnMut(usize)) -> Result<Gradients> {
    let nodes: Vec<Tensor> = output.sorted_nodes().into_iter().cloned().collect();
    let mut held = Held { wanted: nodes.iter().map(Tensor::id).collect(), gradients: HashMap::new() };
    held.add(output.id(), Gradient { tensor: gradient.detach(), is_own: false })?;
    drop((output, gradient));
    // Each tensor is dropped when its turn is over: no other handle is left, so its memory is free.
    for tensor in nodes {
        if tensor.is_variable() {
            continue;
        }
        let Some(gradient) = held.gradients.remove(&tensor.id()) else {
            bail!("backward: no gradient reached a tensor of shape {:?} that the loss depends on", tensor.dims());
        };
        match origin(tensor.id()) {
            Some(Origin::Operation(node)) => held.through(&node, &tensor, gradient)?,
            Some(Origin::Reshape(id, shape)) => {
                held.add(id, Gradient { tensor: gradient.tensor.reshape(shape)?, ..gradient })?;
            }
            None => bail!(
                "backward: a tensor of shape {:?} was made by an operation that has no gradient here; use the one of \
                 ops, or Tensor::backward for the whole graph",
                tensor.dims()
            ),
        }
        observe(held.gradients.len());
    }
    Ok(Gradients(held.gradients))
}

struct Gradient {
    tensor: Tensor,
    /// No one else holds its memory: it may be added to in place.
    is_own: bool,
}

/// What has arrived so far at tensors whose turn is still to come, and at variables.
struct Held {
    /// All that the loss depends on by way of floats.
    wanted: HashSet<TensorId>,
    gradients: HashMap<TensorId, Gradient>,
}

impl Held {
    /// Hands the gradient of `output` on to the inputs of its operation.
    fn through(&mut self, node: &Node, output: &Tensor, gradient: Gradient) -> Result<()> {
        let inputs: Vec<&Tensor> = node.inputs.iter().collect();
        let given = gradient.tensor;
        let outer = LEFT.take();
        let (gradients, made) = watch(|| (node.backward)(&inputs, output, &given));
        let left = LEFT.replace(outer);
        let gradients = gradients?;
        for (id, tensor) in left {
            self.add(id, Gradient { tensor, is_own: false })?;
        }
        if gradients.len() != inputs.len() {
            bail!("{}: {} gradients for {} inputs", node.name, gradients.len(), inputs.len());
        }
        let ids: Vec<TensorId> = gradients.iter().flatten().map(Tensor::id).collect();
        // New memory is the walk's own if it came back once, and nothing beside it that could be a view of it.
        let is_known = |id: &TensorId| made.contains(id) || *id == given.id();
        let all_known = ids.iter().all(is_known);
        let is_own = |id| all_known && made.contains(&id) && ids.iter().filter(|other| **other == id).count() == 1;
        for (input, gradient) in inputs.iter().zip(gradients) {
            if !self.wanted.contains(&input.id()) {
                continue;
            }
            match gradient {
                Some(tensor) if tensor.dims() == input.dims() => {
                    let is_own = is_own(tensor.id());
                    self.add(input.id(), Gradient { tensor: tensor.detach(), is_own })?;
                }
                Some(tensor) => {
                    bail!("{}: gradient {:?} for an input {:?}", node.name, tensor.dims(), input.dims())
                }
                None => bail!("{}: no gradient for an input {:?} that needs one", node.name, input.dims()),
            }
        }
        Ok(())
    }

    fn add(&mut self, id: TensorId, gradient: Gradient) -> Result<()> {
        add_to(&mut self.gradients, id, gradient)
    }
}

fn add_to(gradients: &mut HashMap<TensorId, Gradient>, id: TensorId, gradient: Gradient) -> Result<()> {
    match gradients.entry(id) {
        Entry::Vacant(place) => {
            place.insert(gradient);
        }
        Entry::Occupied(mut place) => {
            let held = place.get_mut();
            let total = held.plus(&gradient)?;
            *held = total;
        }
    }
    Ok(())
}

impl Gradient {
    /// In the memory of the one that may be changed, where there is one.
    fn plus(&self, other: &Self) -> Result<Self> {
        let (target, addend) = match (self.is_own, other.is_own) {
            (true, _) => (&self.tensor, &other.tensor),
            (false, true) => (&other.tensor, &self.tensor),
            (false, false) => {
                let tensor = sum(&self.tensor, &other.tensor)?;
                return Ok(Self { is_own: on_cpu(&tensor), tensor });
            }
        };
        add_in_place(target, addend)?;
        Ok(Self { tensor: target.clone(), is_own: true })
    }
}
