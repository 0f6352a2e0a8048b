"""Single operations in PyTorch. Each function gives a case's variants: name → a function that runs it once and returns
the seconds of its timed part. Where PyTorch has a choice (memory format, where the heads lie), all choices are
variants and the fastest is compared."""

from functools import partial

import torch
from torch.nn import functional as F

from . import place


def normal(*shape, fan_in=1):
    return (torch.randn(*shape) / fan_in**0.5).to(place.dtype())


def timed(case, function, *inputs):
    """Runs `function` on the inputs as the case's pass asks."""
    if case["pass"] == "forward":

        def run():
            with torch.no_grad():
                started = place.clock()
                output = function(*inputs)
                seconds = place.clock() - started
            del output  # freeing it is not timed, nor is it on jedi's side
            return seconds

        return run

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    ones = torch.ones_like(function(*leaves).detach())

    def run_with_gradients():
        started = place.clock()
        output = function(*leaves)
        forward = place.clock()
        output.backward(ones)
        ended = place.clock()
        for leaf in leaves:
            leaf.grad = None
        return ended - (started if case["pass"] == "both" else forward)

    return run_with_gradients


def both_formats(case, function, picture, *rest):
    """Channels first and last; `rest` that are pictures or kernels follow."""
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (picture, *rest)]
    return {"contiguous": timed(case, function, picture, *rest), "channels_last": timed(case, function, *last)}


def conv(case):
    size, kernel, inputs, outputs = case["size"], case["kernel"], case["inputs"], case["outputs"]
    picture = normal(case["images"], inputs, size, size)
    weight = normal(outputs, inputs, kernel, kernel, fan_in=inputs * kernel * kernel)
    function = partial(F.conv2d, stride=case["stride"], padding=kernel // 2)
    return both_formats(case, function, picture, weight, normal(outputs))


def attention(case):
    batch, heads, width = case["batch"], case["heads"], case["width"]
    shapes = [(batch, case[side], heads * width) for side in ("queries", "keys", "keys")]
    inputs = [normal(*shape) for shape in shapes]

    def split(tensor):
        return tensor.view(batch, -1, heads, width).transpose(1, 2)

    def as_diffusers(q, k, v):
        attended = F.scaled_dot_product_attention(split(q), split(k), split(v))
        return attended.transpose(1, 2).reshape(batch, -1, heads * width)

    heads_first = [split(tensor).contiguous() for tensor in inputs]
    return {
        "heads inside": timed(case, as_diffusers, *inputs),
        "heads outside": timed(case, F.scaled_dot_product_attention, *heads_first),
    }


def group_norm(case):
    channels, size = case["channels"], case["size"]

    def function(x, weight, bias):
        normed = F.group_norm(x, case["groups"], weight, bias, 1e-5)
        return F.silu(normed) if case["silu"] else normed

    picture = normal(case["images"], channels, size, size)
    return both_formats(case, function, picture, normal(channels), normal(channels))


def layer_norm(case):
    width = case["width"]

    def function(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias, 1e-5)

    return {"rows": timed(case, function, normal(case["rows"], width), normal(width), normal(width))}


def geglu(case):
    def function(x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return {"rows": timed(case, function, normal(case["rows"], 2 * case["width"]))}


def linear(case):
    inputs, outputs = case["inputs"], case["outputs"]
    weight = normal(outputs, inputs, fan_in=inputs)
    return {"rows": timed(case, F.linear, normal(case["rows"], inputs), weight, normal(outputs))}


def upsample(case):
    function = partial(F.interpolate, scale_factor=2.0, mode="nearest")
    return both_formats(case, function, normal(case["images"], case["channels"], case["size"], case["size"]))


def adamw(case):
    """Clipping, AdamW and averaged weights, as in a training step."""

    def variant(**kind):
        parameters = [torch.randn(case["length"], requires_grad=True) for _ in range(case["tensors"])]
        for parameter in parameters:
            parameter.grad = torch.randn(case["length"])
        return partial(update, parameters, optimizer(parameters, **kind), averages(parameters))

    return {"fused": variant(fused=True), "foreach": variant(foreach=True)}


def optimizer(parameters, **kind):
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, **kind)


def averages(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def update(parameters, adamw, ema):
    """One optimizer step on the gradients that are there."""
    started = place.clock()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    adamw.step()
    with torch.no_grad():
        torch._foreach_lerp_(ema, parameters, 0.001)
    return place.clock() - started
