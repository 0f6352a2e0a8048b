"""AutoencoderKL: latents, pictures, and the gradients of a reconstruction loss."""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from . import networks
from .files import generator, gradients_by_name, normal, save

TOLERANCE, GRADIENT_TOLERANCE = 3e-6, 2e-5  # three times what was seen
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_spelling(name):
    """SD1.4's names of the attention layers."""
    for new, old in OLD_NAMES.items():
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
    return name


def assert_diffusers_reads_old_names(network, picture, latents):
    with tempfile.TemporaryDirectory() as folder:
        network.save_config(folder)
        weights = {old_spelling(name): value.float().contiguous() for name, value in network.state_dict().items()}
        assert weights.keys() != network.state_dict().keys()
        save_file(weights, Path(folder) / "diffusion_pytorch_model.safetensors")
        again = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).double()
    found = again.encode(picture).latent_dist.mean * network.config.scaling_factor
    assert torch.equal(found, latents)


def write_tiles(folder, network):
    """A picture of several tiles of 16 pixels with a narrow last row and column."""
    random = generator(310)
    factor = network.config.scaling_factor
    picture = torch.rand(2, 3, 40, 28, generator=random).double() * 2 - 1
    latents = normal(random, 2, 4, 20, 14)
    network.enable_tiling()
    tensors = {
        "picture": picture,
        "latents": latents,
        "encoded": network.encode(picture).latent_dist.mean * factor,
        "decoded": network.decode(latents / factor).sample,
    }
    network.disable_tiling()
    save(folder / "vae-tiles.safetensors", tensors, 310, tile=network.tile_sample_min_size, tolerance=TOLERANCE)


def write(folder):
    random = generator(300)
    network = networks.vae().double()
    factor = network.config.scaling_factor
    picture = torch.rand(2, 3, 12, 8, generator=random).double() * 2 - 1
    mean = network.encode(picture).latent_dist.mean
    latents = normal(random, 2, 4, 6, 4)
    decoded = network.decode(latents / factor).sample
    reconstruction = network.decode(mean).sample
    loss = ((reconstruction - picture) ** 2).mean()
    assert_diffusers_reads_old_names(network, picture, mean * factor)
    tensors = {"picture": picture, "encoded": mean * factor, "latents": latents, "decoded": decoded, "loss": loss[None]}
    facts = dict(tolerance=TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE)
    save(folder / "vae-cases.safetensors", tensors, 300, **facts)
    save(folder / "vae-gradients.safetensors", gradients_by_name(network, loss), 300, **facts)
    with torch.no_grad():
        write_tiles(folder, network)
