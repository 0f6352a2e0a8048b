"""The U-Net with coupled self-attention, in several configurations and set sizes, with every parameter's gradient."""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from . import networks
from .files import digest, generator, gradients_by_name, normal, save

# Of each tensor's largest magnitude. Outputs: seen 3e-6. Gradients: three times what was seen, which differs by
# network; PyTorch's own float32 gradients are as far off as jedi's.
OUTPUT_TOLERANCE = 1e-5


class Coupled:
    """Self-attention across the images of a set (JeDi, supplement, section 6); cross-attention as it was."""

    def __init__(self, images):
        self.images, self.attend = images, AttnProcessor()

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, **rest):
        if encoder_hidden_states is not None:
            return self.attend(attn, hidden_states, encoder_hidden_states, **rest)
        total, l, d = hidden_states.shape
        joined = hidden_states.reshape(total // self.images, self.images * l, d)
        return self.attend(attn, joined, **rest).reshape(total, l, d)


def couple(network, images):
    processors = {}
    for name in network.attn_processors:
        processors[name] = Coupled(images) if ".attn1." in name else AttnProcessor()
    assert any(isinstance(processor, Coupled) for processor in processors.values())
    network.set_attn_processor(processors)
    return network


def predict(network, inputs, images):
    """eps for the inputs of `jedi inspect eps`; one timestep a set."""
    joined = torch.cat([inputs["noisy"], inputs["mask"].expand_as(inputs["noisy"][:, :1]), inputs["reference"]], dim=1)
    timesteps = inputs["timesteps"].repeat_interleave(images)
    return couple(network, images)(joined, timesteps, encoder_hidden_states=inputs["context"]).sample


def inputs_for(random, sets, images, size, tokens=5):
    total, (h, w) = sets * images, size
    mask = torch.randint(0, 2, (total, 1, 1, 1), generator=random).double().expand(total, 1, h, w)
    return {
        "noisy": normal(random, total, 4, h, w),
        "mask": mask,
        "reference": normal(random, total, 4, h, w) * (1 - mask),
        "timesteps": torch.randint(0, 1000, (sets,), generator=random),
        "context": normal(random, total, tokens, networks.WIDTH),
        "noise": normal(random, total, 4, h, w),
    }


def case(network, seed, images, sets, size=(6, 4)):
    """Inputs, eps, loss and gradients for one set size."""
    inputs = inputs_for(generator(seed), sets, images, size)
    eps = predict(network, inputs, images)
    loss = ((eps - inputs["noise"]) ** 2).mean()
    return {**inputs, "eps": eps, "loss": loss[None]}, gradients_by_name(network, loss)


def write_network(folder, name, network, seed, gradient_tolerance, with_weights=True):
    """`<name>.safetensors` (weights), `<name>-cases` (set sizes 1 to 4), `<name>-gradients` (set size 3, whole)."""
    # diffusers keeps a list in random order among the fields.
    config = {name: value for name, value in network.config.items() if not name.startswith("_use_default")}
    facts = dict(config=config, tolerance=OUTPUT_TOLERANCE, gradient_tolerance=gradient_tolerance)
    if with_weights:
        save(folder / f"{name}.safetensors", network.state_dict(), seed, **facts)
    network = network.double()
    stored = {}
    for images in (1, 2, 3, 4):
        tensors, gradients = case(network, seed + images, images, sets=2)
        stored.update({f"n{images}.{key}": value for key, value in tensors.items()})
        stored[f"n{images}.gradients"] = digest(gradients)
        if images == 3:
            save(folder / f"{name}-gradients.safetensors", gradients, seed + images, **facts)
    save(folder / f"{name}-cases.safetensors", stored, seed, **facts)


def write(folder):
    write_network(folder, "unet-sd1", networks.unet(), 200, 1e-4, with_weights=False)
    sd2 = networks.unet(
        seed=4,
        block_out_channels=[4, 8],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        layers_per_block=2,
        attention_head_dim=[1, 4],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        norm_num_groups=2,
    )
    write_network(folder, "unet-sd2", sd2, 210, 5e-4)
    # One level only: down, middle and up block of each kind.
    one_level = dict(block_out_channels=[6], attention_head_dim=2, norm_num_groups=2)
    cross = dict(down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"])
    plain = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    write_network(folder, "block-cross", networks.unet(seed=5, **one_level, **cross), 220, 1.5e-4)
    write_network(folder, "block-plain", networks.unet(seed=6, **one_level, **plain), 230, 3e-5)
