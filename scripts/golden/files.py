"""How cases are stored: float32 safetensors with tolerances, seed and versions in the metadata."""

import json
from importlib.metadata import version

import torch
from safetensors.torch import save_file

SEED = 20240617  # CVPR 2024's first day; every module offsets it


def generator(offset):
    return torch.Generator().manual_seed(SEED + offset)


def normal(random, *shape, scale=1.0):
    """Float64 values that float32 holds exactly."""
    return (torch.randn(*shape, generator=random) * scale).double()


def save(path, tensors, seed, **facts):
    """Facts, seed and versions become one entry of the metadata, as JSON: with several, their order would be random."""
    facts.update({library: version(library) for library in ("torch", "diffusers", "transformers")}, seed=SEED + seed)
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        stored[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()
        assert stored[name].dtype in (torch.float32, torch.int64), (name, tensor.dtype)
        assert torch.isfinite(stored[name]).all(), name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path, {"facts": json.dumps(facts)})
    size = path.stat().st_size
    print(f"{path.name}: {len(stored)} tensors, {size / 1000:.0f} kB")
    assert size <= 300_000, f"{path} is too large to commit"


def gradients_by_name(network, loss):
    """Every parameter's gradient; one that the loss does not reach is a mistake in the case."""
    network.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not missing, missing
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def digest(gradients, first=4):
    """A row a tensor, in the order of the sorted names: its L2 norm, its sum, its first values (zeros where none)."""
    rows = []
    for _, gradient in sorted(gradients.items()):
        flat = gradient.flatten()
        head = torch.zeros(first, dtype=flat.dtype)
        head[: min(first, flat.numel())] = flat[:first]
        rows.append(torch.cat([flat.norm()[None], flat.sum()[None], head]))
    return torch.stack(rows)
