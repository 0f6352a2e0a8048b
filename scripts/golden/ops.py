"""Single operations: output and the gradient of every input, for a random gradient of the output."""

import torch
import torch.nn.functional as F

from .files import generator, normal, save

TOLERANCE = 1e-6  # of the largest magnitude


class Cases:
    """Collects the cases of one file: `<case>.in.<name>`, `<case>.dy`, `<case>.out`, `<case>.grad.<name>`."""

    def __init__(self, seed):
        self.seed, self.random, self.tensors, self.attributes = seed, generator(seed), {}, {}

    def normal(self, *shape, scale=1.0):
        return normal(self.random, *shape, scale=scale)

    def add(self, case, op, function, inputs, **attributes):
        inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        out = function(**inputs)
        dy = self.normal(*out.shape)
        gradients = torch.autograd.grad(out, list(inputs.values()), dy)
        self.attributes[case] = {"op": op, **attributes}
        self.tensors[f"{case}.dy"], self.tensors[f"{case}.out"] = dy, out
        for (name, value), gradient in zip(inputs.items(), gradients):
            self.tensors[f"{case}.in.{name}"], self.tensors[f"{case}.grad.{name}"] = value, gradient

    def write(self, path):
        save(path, self.tensors, self.seed, cases=self.attributes, tolerance=TOLERANCE)


def channels_first(x):
    return x.movedim(-1, 1)


def channels_last(x):
    return x.movedim(1, -1)


def attention(q, k, v, heads, causal):
    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def attention_cases(folder):
    # Rows of jedi's tiles are 16 to 256 queries, fewer as keys grow: lengths that are no multiples, below and above.
    cases = {
        "attention-self": [("width8", 2, 37, 37, 1, 8), ("width40", 1, 19, 19, 2, 40), ("width80", 1, 17, 17, 1, 80)],
        "attention-cross": [
            ("width80", 1, 9, 11, 1, 80),
            ("tiles", 1, 270, 7, 2, 8),
            ("narrow_tiles", 1, 150, 900, 1, 2),
        ],
        "attention-causal": [("text", 1, 77, 77, 2, 4), ("tiles", 1, 300, 300, 1, 3), ("heads", 1, 5, 5, 3, 40)],
    }
    for seed, (kind, shapes) in enumerate(cases.items()):
        file = Cases(100 + seed)
        for name, b, l, s, heads, d in shapes:
            inputs = {
                "q": file.normal(b, l, heads * d),
                "k": file.normal(b, s, heads * d),
                "v": file.normal(b, s, heads * d),
            }
            causal = kind == "attention-causal"
            attributes = dict(heads=heads, causal=causal)
            if name == "narrow_tiles":
                # The query's gradient is a sum over 900 keys that cancel; seen 1.2e-6.
                attributes["tolerance"] = 4e-6
            file.add(name, "attention", lambda q, k, v: attention(q, k, v, heads, causal), inputs, **attributes)
        # Scores around 200: a softmax that does not subtract the maximum overflows. In float32 such a score is rounded
        # by 1e-5, which moves its probability by as much, so that no float32 softmax reaches TOLERANCE; PyTorch's own
        # was seen to be off by 3.6e-6, jedi's by 4.4e-6.
        if kind == "attention-self":
            inputs = {name: file.normal(1, 21, 8, scale=8.0) for name in "qkv"}
            file.add(
                "sharp",
                "attention",
                lambda q, k, v: attention(q, k, v, 1, False),
                inputs,
                heads=1,
                causal=False,
                tolerance=1.3e-5,
            )
        file.write(folder / f"{kind}.safetensors")


def conv_cases(folder):
    file = Cases(110)
    shapes = [  # name, b, h, w, in, out, kernel, stride, pad (top, bottom, left, right), bias
        ("same_3x3", 2, 7, 5, 3, 6, 3, 1, [1, 1, 1, 1], True),
        ("same_3x3_wide", 1, 9, 23, 17, 18, 3, 1, [1, 1, 1, 1], True),
        ("same_3x3_no_bias", 1, 4, 6, 5, 2, 3, 1, [1, 1, 1, 1], False),
        ("one_pixel", 2, 1, 1, 4, 3, 3, 1, [1, 1, 1, 1], True),
        ("same_1x1", 2, 5, 3, 7, 4, 1, 1, [0, 0, 0, 0], True),
        ("halving_unet_even", 2, 8, 6, 4, 5, 3, 2, [1, 1, 1, 1], True),
        ("halving_unet_odd", 1, 7, 9, 4, 5, 3, 2, [1, 1, 1, 1], True),
        ("halving_vae_even", 2, 8, 6, 4, 5, 3, 2, [0, 1, 0, 1], True),
        ("halving_vae_odd", 1, 7, 9, 4, 5, 3, 2, [0, 1, 0, 1], True),
        ("halving_vae_mixed", 1, 6, 11, 3, 4, 3, 2, [0, 1, 0, 1], True),
    ]
    for name, b, h, w, c, out, kernel, stride, pad, bias in shapes:
        inputs = {
            "x": file.normal(b, h, w, c),
            "weight": file.normal(out, c, kernel, kernel, scale=(c * kernel * kernel) ** -0.5),
        }
        if bias:
            inputs["bias"] = file.normal(out)

        def conv(x, weight, bias=None):
            top, bottom, left, right = pad
            padded = F.pad(channels_first(x), (left, right, top, bottom))
            return channels_last(F.conv2d(padded, weight, bias, stride=stride))

        file.add(name, "conv2d", conv, inputs, stride=stride, pad=pad)
    file.write(folder / "conv.safetensors")


def norm_cases(folder):
    file = Cases(120)

    def scale_and_shift(c):
        return {"weight": 1 + file.normal(c, scale=0.3), "bias": file.normal(c, scale=0.3)}

    for activation in ("none", "silu"):

        def group_norm(x, weight, bias):
            out = channels_last(F.group_norm(channels_first(x), groups, weight, bias, eps))
            return F.silu(out) if activation == "silu" else out

        for name, shape, groups, eps in [
            ("picture", (2, 5, 7, 12), 4, 1e-5),
            ("one_group", (2, 3, 3, 8), 1, 1e-6),
            ("channel_groups", (1, 9, 4, 6), 6, 1e-5),
            ("tokens", (2, 33, 16), 4, 1e-6),
        ]:
            inputs = {"x": file.normal(*shape) + 0.5, **scale_and_shift(shape[-1])}
            file.add(
                f"group_norm.{name}.{activation}",
                "group_norm",
                group_norm,
                inputs,
                groups=groups,
                eps=eps,
                silu=activation == "silu",
            )
    for name, shape in [("tokens", (2, 13, 24)), ("rows", (5, 7)), ("wide", (3, 320))]:
        inputs = {"x": 2 * file.normal(*shape) - 0.5, **scale_and_shift(shape[-1])}
        function = lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
        file.add(f"layer_norm.{name}", "layer_norm", function, inputs, eps=1e-5)
    file.write(folder / "norm.safetensors")


def activation_cases(folder):
    file = Cases(130)
    # Both tails, where sigmoid and erf saturate, and the neighbourhood of zero.
    tail = [2.0**-20, 0.5, 4.0, 5.5, 10.0, 30.0, 90.0]
    special = torch.tensor([-x for x in tail] + [0.0] + tail).double()
    functions = {
        "silu": lambda x: F.silu(x),
        "gelu": lambda x: F.gelu(x),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    for op, function in functions.items():
        file.add(f"{op}.typical", op, function, {"x": file.normal(3, 11, 7, scale=2.0)})
        file.add(f"{op}.special", op, function, {"x": special})

    def geglu(x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    file.add("geglu", "geglu", geglu, {"x": file.normal(2, 9, 26, scale=1.5)})

    def linear(x, weight, bias=None):
        return F.linear(x, weight, bias)

    for name, shape, out, bias in [
        ("tokens", (2, 19, 24), 10, True),
        ("no_bias", (3, 17), 33, False),
        ("row", (1, 70), 5, True),
    ]:
        inputs = {"x": file.normal(*shape), "weight": file.normal(out, shape[-1], scale=shape[-1] ** -0.5)}
        if bias:
            inputs["bias"] = file.normal(out)
        file.add(f"linear.{name}", "linear", linear, inputs)
    double = lambda x: channels_last(F.interpolate(channels_first(x), scale_factor=2.0, mode="nearest"))
    file.add("upsample2x", "upsample2x", double, {"x": file.normal(2, 3, 5, 7)})
    inputs = {"x": file.normal(3, 4, 5, 6), "vector": file.normal(3, 6)}
    file.add("add_per_image", "add_per_image", lambda x, vector: x + vector[:, None, None], inputs)
    file.write(folder / "elementwise.safetensors")


def write(folder):
    attention_cases(folder / "ops")
    conv_cases(folder / "ops")
    norm_cases(folder / "ops")
    activation_cases(folder / "ops")
