"""Weights that need no file: each number follows from the tensor's name and its place, here and in tests/parity/drawn.rs."""

import numpy as np
import torch

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def numbers(name, count):
    """`count` numbers in [−1, 1) in steps of 2⁻²³: SplitMix64 of the name's FNV-1a hash and the place."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def tensor(name, shape):
    """Biases around zero, scales of norms around one, weights by fan-in."""
    values = numbers(name, int(np.prod(shape)))
    if name.endswith("bias"):
        values = 0.1 * values
    elif len(shape) < 2:
        values = 1 + 0.3 * values
    else:
        values = np.sqrt(3 / (values.size // shape[0])) * values
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def drawn(network):
    """The network with these weights, and the shapes by name of what its checkpoint holds (but buffers of integers)."""
    shapes = {}
    with torch.no_grad():
        for name, stored in network.state_dict(keep_vars=True).items():
            if stored.is_floating_point():
                shapes[name] = list(stored.shape)
        # Tied tensors have several names, of which the first in order counts.
        seen = set()
        for name, stored in sorted(network.state_dict(keep_vars=True).items()):
            if stored.is_floating_point() and stored.data_ptr() not in seen:
                seen.add(stored.data_ptr())
                stored.data.copy_(tensor(name, list(stored.shape)))
            elif stored.is_floating_point():
                del shapes[name]
    return network.eval(), shapes


def picture(width, height):
    """A picture by rule: slopes, fine stripes and a coarse pattern; `[height, width, 3]` bytes."""
    y, x, channel = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    slope = 3 * x + 5 * y + 40 * channel
    return ((slope + 90 * ((x // 7 + y // 5 + channel) % 2) + 25 * (x % 2)) % 256).astype(np.uint8)
