//! Gradient checkpointing: a part of a network keeps its inputs alone, and is computed again when its gradients are due
//! (Chen et al. 2016). Memory for activations becomes that of the parts' inputs and of one part, for one more forward pass.

use candle_core::{Result, Tensor, Var};

use super::backward::{backward_from, leave_for_parameters};
use super::graft::graft_tensor;

/// `f(inputs)`, whose inside is not kept. One to three inputs; the variables that `f` holds get their gradients too.
pub fn checkpoint<const N: usize>(
    inputs: [&Tensor; N],
    f: impl Fn([&Tensor; N]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    // Without anything to hand gradients on to, there is nothing to hang the second pass on: the inside is kept.
    if !inputs.iter().any(|input| input.track_op()) {
        return f(inputs);
    }
    let detached = inputs.map(Tensor::detach);
    let output = f(detached.each_ref())?;
    graft_tensor("checkpoint", &inputs, &output, move |inputs, _, gradient| {
        let leaves = inputs.iter().map(|input| Var::from_tensor(&input.detach())).collect::<Result<Vec<Var>>>()?;
        let output = f(std::array::from_fn(|i| leaves[i].as_tensor()))?;
        let mut gradients = backward_from(output, gradient.clone())?;
        let own = inputs.iter().zip(&leaves).map(|(input, leaf)| match gradients.remove(leaf) {
            Some(gradient) => Ok(Some(gradient)),
            // `f` does not use it.
            None => input.zeros_like().map(Some),
        });
        let own = own.collect();
        leave_for_parameters(gradients);
        own
    })
}
