//! What the backward pass promises whatever the operations: every gradient arrives, none is changed behind its holder's
//! back, what is not ours is refused, and memory is given back on the way.

use std::sync::{Arc, Mutex, Weak};

use candle_core::{Device, Result, Tensor, TensorId, Var};

use super::backward::{by_candle, walk};
use super::graft::{graft_tensor, tensor};
use super::tape::origin;
use super::*;

const X: [f32; 3] = [0.5, -1.0, 2.0];

fn var(values: &[f32]) -> Var {
    Var::new(values, &Device::Cpu).unwrap()
}

fn values(gradients: &Gradients, var: &Var) -> Vec<f32> {
    gradients.get(var).expect("a gradient").to_vec1().unwrap()
}

fn assert_close(found: &[f32], expected: impl Fn(f32) -> f32) {
    for (found, x) in found.iter().zip(X) {
        assert!((found - expected(x)).abs() <= 1e-6 * expected(x).abs().max(1.0), "{found} at {x}: {}", expected(x));
    }
}

/// x itself, by an operation whose backward function is given.
fn probe(
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Tensor {
    graft_tensor("probe", inputs, inputs[0], move |_, _, gradient| backward(gradient)).unwrap()
}

/// The walk's message of refusal.
fn refusal(loss: Tensor) -> String {
    backward(loss).err().expect("a refusal").to_string()
}

#[test]
fn a_tensor_that_is_used_three_times_gets_all_three_gradients() {
    let x = var(&X);
    let h = square(&x).unwrap();
    // h + e^h + h·h, whose slope in h is 1 + e^h + 2h.
    let out = add(&add(&h, &exp(&h).unwrap()).unwrap(), &mul(&h, &h).unwrap()).unwrap();
    drop(h);
    assert_close(&values(&backward(out).unwrap(), &x), |x| 2.0 * x * (1.0 + (x * x).exp() + 2.0 * x * x));
}

#[test]
fn gradients_that_two_inputs_share_are_not_changed_for_both() {
    let (x, z) = (var(&X), var(&X));
    let (a, b) = (square(&x).unwrap(), square(&z).unwrap());
    // (a + b) + a·a + a: what the sum hands to a and b is one tensor, and only a's is added to.
    let out = add(&add(&add(&a, &b).unwrap(), &mul(&a, &a).unwrap()).unwrap(), &a).unwrap();
    let gradients = backward(out).unwrap();
    assert_close(&values(&gradients, &z), |x| 2.0 * x);
    assert_close(&values(&gradients, &x), |x| 2.0 * x * (2.0 + 2.0 * x * x));
}

#[test]
fn memory_that_a_backward_function_returns_twice_is_not_added_to() {
    let twice = |gradient: &Tensor| -> Result<Tensor> {
        let values = gradient.to_vec1::<f32>()?.into_iter().map(|dy| 2.0 * dy).collect();
        Ok(tensor::<f32>(values, 3))
    };
    let the_same = move |gradient: &Tensor| {
        let new = twice(gradient)?;
        Ok(vec![Some(new.clone()), Some(new)])
    };
    let a_view = move |gradient: &Tensor| {
        let new = twice(gradient)?;
        Ok(vec![Some(new.clone()), Some(new.reshape((3, 1))?.reshape(3)?)])
    };
    let (x, z) = (var(&X), var(&X));
    for is_view in [false, true] {
        let (a, b) = (square(&x).unwrap(), square(&z).unwrap());
        let both = if is_view { probe(&[&a, &b], a_view) } else { probe(&[&a, &b], the_same) };
        let gradients = backward(add(&both, &a).unwrap()).unwrap();
        assert_close(&values(&gradients, &x), |x| 2.0 * x * 3.0);
        assert_close(&values(&gradients, &z), |x| 2.0 * x * 2.0);
    }
}

#[test]
fn a_gradient_that_a_backward_function_keeps_stays_as_it_was() {
    let kept: Arc<Mutex<Option<Tensor>>> = Arc::default();
    let keeper = kept.clone();
    let x = var(&X);
    let h = square(&x).unwrap();
    // The gradient of the probe's output comes from a kernel as new memory; it hands it on and keeps a handle.
    let kept_on = probe(&[&h], move |gradient| {
        *keeper.lock().unwrap() = Some(gradient.clone());
        Ok(vec![Some(gradient.clone())])
    });
    let out = add(&affine(&kept_on, 3.0, 0.0).unwrap(), &affine(&h, 5.0, 0.0).unwrap()).unwrap();
    let gradients = backward(out).unwrap();
    assert_close(&values(&gradients, &x), |x| 2.0 * x * 8.0);
    let kept = kept.lock().unwrap().take().expect("the probe was called").to_vec1::<f32>().unwrap();
    assert_eq!(kept, [3.0; 3]);
}

#[test]
fn the_gradient_that_the_caller_gives_stays_as_it_was() {
    let (x, seed) = (var(&X), Tensor::new(&X, &Device::Cpu).unwrap());
    let gradients = backward_from(add(&x, &x).unwrap(), seed.clone()).unwrap();
    assert_close(&values(&gradients, &x), |x| 2.0 * x);
    assert_eq!(seed.to_vec1::<f32>().unwrap(), X);
}

#[test]
fn an_operation_that_is_not_ours_is_refused_by_the_shape_of_its_result() {
    let x = var(&X);
    let inside = (square(&x).unwrap().reshape((3, 1)).unwrap() * 2.0).unwrap();
    let message = refusal(mean_all(&inside).unwrap());
    assert!(message.contains("[3, 1]") && message.contains("no gradient here"), "{message}");
    // A reshape of ours does not hide it.
    let message = refusal(mean_all(&reshape(&inside, (1, 3)).unwrap()).unwrap());
    assert!(message.contains("[1, 3]") && message.contains("no gradient here"), "{message}");
    // Nor does it matter where no variable is behind it.
    let constant = (x.as_detached_tensor() * 2.0).unwrap();
    assert_eq!(backward(mul(&x, &constant).unwrap()).unwrap().len(), 1);
}

#[test]
fn a_gradient_that_does_not_arrive_or_does_not_fit_is_refused() {
    let x = var(&X);
    let h = square(&x).unwrap();
    let message = refusal(probe(&[&h], |_| Ok(vec![None])));
    assert!(message.contains("probe: no gradient for an input [3]"), "{message}");
    let message = refusal(probe(&[&h], |gradient| Ok(vec![Some(gradient.reshape((3, 1))?)])));
    assert!(message.contains("probe: gradient [3, 1] for an input [3]"), "{message}");
    let message = refusal(probe(&[&h, &x], |gradient| Ok(vec![Some(gradient.clone())])));
    assert!(message.contains("probe: 1 gradients for 2 inputs"), "{message}");
    let message = refusal(square(&x.as_detached_tensor()).unwrap());
    assert!(message.contains("depends on no variable"), "{message}");
    let message = backward_from(h, Tensor::new(&[1f32], &Device::Cpu).unwrap()).err().unwrap().to_string();
    assert!(message.contains("gradient [1] for an output [3]"), "{message}");
}

#[test]
fn nothing_of_a_graph_is_left_after_its_backward_pass_or_without_one() {
    let x = var(&X);
    let graph = || {
        let h = reshape(&reshape(&square(&x).unwrap(), (3, 1)).unwrap(), (1, 3)).unwrap();
        let out = mean_all(&mul(&h, &h).unwrap()).unwrap();
        let ids: Vec<TensorId> =
            out.sorted_nodes().into_iter().filter(|node| !node.is_variable()).map(Tensor::id).collect();
        assert!(ids.len() == 5 && ids.iter().all(|id| origin(*id).is_some()));
        (out, ids)
    };
    let (out, ids) = graph();
    let mut gradients = backward(out).unwrap();
    assert!(ids.iter().all(|id| origin(*id).is_none()));
    assert_eq!((gradients.len(), gradients.is_empty()), (1, false));
    assert!(gradients.remove(&x).is_some() && gradients.get(&x).is_none() && gradients.is_empty());
    let (out, ids) = graph();
    drop(out);
    assert!(ids.iter().all(|id| origin(*id).is_none()));
}

#[test]
fn gradients_and_activations_are_freed_on_the_way() {
    let x = var(&X);
    let mut h = x.as_tensor().clone();
    for _ in 0..20 {
        h = add(&h, &exp(&affine(&h, 0.1, 0.0).unwrap()).unwrap()).unwrap();
    }
    let ones = h.ones_like().unwrap();
    let (mut most, mut steps) = (0, 0);
    walk(h, ones, |held| (most, steps) = (most.max(held), steps + 1)).unwrap();
    assert_eq!((most, steps), (2, 60)); // One on each of the two ways.

    // Of two operations in a row, the later is gone when it is the earlier's turn.
    let token = Arc::new(());
    let (later, held): (Weak<()>, _) = (Arc::downgrade(&token), token);
    let was_alive = Arc::new(Mutex::new(None));
    let (seen, seen_later) = (was_alive.clone(), later.clone());
    let out = probe(&[&x], move |gradient| {
        *seen.lock().unwrap() = Some(seen_later.upgrade().is_some());
        Ok(vec![Some(gradient.clone())])
    });
    let out = probe(&[&out], move |gradient| {
        let _own = &held;
        Ok(vec![Some(gradient.clone())])
    });
    assert!(later.upgrade().is_some());
    backward(out).unwrap();
    assert_eq!(*was_alive.lock().unwrap(), Some(false));
}

#[test]
fn the_way_of_the_other_devices_gives_the_same() {
    let (x, seed) = (var(&X), Tensor::new(&X, &Device::Cpu).unwrap());
    let h = square(&x).unwrap();
    let out = mul(&h, &exp(&h).unwrap()).unwrap();
    let candles = by_candle(&out, &seed).unwrap();
    assert_eq!(candles.len(), 1);
    assert!(!candles.get(&x).unwrap().track_op());
    assert_close(&values(&candles, &x), |x| x * 2.0 * x * (x * x).exp() * (1.0 + x * x));
    assert_close(&values(&backward_from(out, seed).unwrap(), &x), |x| x * 2.0 * x * (x * x).exp() * (1.0 + x * x));
}

#[test]
fn a_graph_that_is_kept_can_be_walked_again() {
    let x = var(&X);
    let out = reshape(&square(&reshape(&x, (3, 1)).unwrap()).unwrap(), 3).unwrap();
    let (first, second) = (backward(out.clone()).unwrap(), backward(out).unwrap());
    assert_eq!(values(&first, &x), values(&second, &x));
}

#[test]
fn a_backward_function_may_recompute_and_walk_a_graph_of_its_own() {
    // What gradient checkpointing will do: nothing between input and output is kept.
    let segment = |x: &Tensor| exp(&square(x)?);
    let checkpointed = |x: &Tensor| {
        graft_tensor("checkpoint", &[x], &segment(&x.detach())?, move |inputs, _, gradient| {
            let input = Var::from_tensor(&inputs[0].detach())?;
            let mut gradients = backward_from(segment(&input)?, gradient.clone())?;
            Ok(vec![gradients.remove(&input)])
        })
    };
    let x = var(&[0.5, -1.0, 1.5]);
    let gradients = |f: &dyn Fn(&Tensor) -> Result<Tensor>| {
        let h = affine(&x, 0.5, 0.1).unwrap();
        let out = mul(&f(&h).unwrap(), &h).unwrap();
        drop(h);
        values(&backward(out).unwrap(), &x)
    };
    assert_eq!(gradients(&checkpointed), gradients(&segment));
}
