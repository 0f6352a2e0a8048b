//! Single operations: output and the gradient of every input.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var};
use jedi::ops::{self, Activation, Conv2d, Groups, Mask};
use serde_json::{Map, Value};

use crate::compare::Comparison;
use crate::golden::Golden;

type Attributes = Map<String, Value>;

fn number(attributes: &Attributes, name: &str) -> usize {
    attributes[name].as_u64().expect(name) as usize
}

fn flag(attributes: &Attributes, name: &str) -> bool {
    attributes[name].as_bool().expect(name)
}

/// Calls the operation that a case names.
fn apply(attributes: &Attributes, inputs: &BTreeMap<String, Var>) -> Result<Tensor> {
    let input = |name: &str| inputs[name].as_tensor();
    let bias = inputs.get("bias").map(Var::as_tensor);
    match attributes["op"].as_str().expect("op") {
        "attention" => {
            let mask = if flag(attributes, "causal") { Mask::Causal } else { Mask::None };
            ops::attention(input("q"), input("k"), input("v"), number(attributes, "heads"), mask)
        }
        "conv2d" => {
            let pad = serde_json::from_value(attributes["pad"].clone()).expect("pad");
            let conv = Conv2d { stride: number(attributes, "stride"), pad };
            ops::conv2d(input("x"), input("weight"), bias, conv)
        }
        "group_norm" => {
            let eps = attributes["eps"].as_f64().expect("eps");
            let activation = if flag(attributes, "silu") { Activation::Silu } else { Activation::None };
            let groups = Groups { count: number(attributes, "groups"), eps };
            ops::group_norm(input("x"), input("weight"), input("bias"), groups, activation)
        }
        "layer_norm" => {
            ops::layer_norm(input("x"), input("weight"), input("bias"), attributes["eps"].as_f64().expect("eps"))
        }
        "linear" => ops::linear(input("x"), input("weight"), bias),
        "add_per_image" => ops::add_per_image(input("x"), input("vector")),
        "silu" => ops::silu(input("x")),
        "gelu" => ops::gelu(input("x")),
        "quick_gelu" => ops::quick_gelu(input("x")),
        "geglu" => ops::geglu(input("x")),
        "upsample2x" => ops::upsample2x(input("x")),
        other => panic!("no operation {other}"),
    }
}

fn check(file: &str) {
    let golden = Golden::open(&format!("ops/{file}"));
    let usual_tolerance: f64 = golden.fact("tolerance");
    let cases: BTreeMap<String, Attributes> = golden.fact("cases");
    let mut comparison = Comparison::default();
    for (case, attributes) in &cases {
        let tolerance = attributes.get("tolerance").and_then(Value::as_f64).unwrap_or(usual_tolerance);
        let inputs: BTreeMap<String, Var> = golden
            .below(&format!("{case}.in."))
            .into_iter()
            .map(|(name, value)| (name, Var::from_tensor(&value).unwrap()))
            .collect();
        let out = apply(attributes, &inputs).unwrap();
        comparison.tensor(&format!("{case}.out"), &out, golden.tensor(&format!("{case}.out")), tolerance);
        let gradients = ops::backward_from(out, golden.tensor(&format!("{case}.dy")).clone()).unwrap();
        let expected = golden.below(&format!("{case}.grad."));
        comparison.names(case, &inputs, &expected);
        for (name, expected) in &expected {
            let name_in_case = format!("{case}.grad.{name}");
            match gradients.get(&inputs[name]) {
                Some(gradient) => comparison.tensor(&name_in_case, gradient, expected, tolerance),
                None => comparison.fail(format!("{name_in_case}: no gradient")),
            }
        }
    }
    comparison.finish();
}

#[test]
fn self_attention_is_pytorchs() {
    check("attention-self");
}

#[test]
fn cross_attention_is_pytorchs() {
    check("attention-cross");
}

#[test]
fn causal_attention_is_pytorchs() {
    check("attention-causal");
}

#[test]
fn convolution_is_pytorchs() {
    check("conv");
}

#[test]
fn norms_are_pytorchs() {
    check("norm");
}

#[test]
fn elementwise_and_linear_operations_are_pytorchs() {
    check("elementwise");
}
