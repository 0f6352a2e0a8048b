"""Tiny random networks in the shape of Stable Diffusion's, and the pipeline folder made of them."""

import json

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from . import vocabulary
from .files import generator

WIDTH = 16  # d, of the text encoder and so of the cross-attention
TOKENS = 77


def unet(seed=1, **changes):
    """SD1.x by default: 9 input channels, `attention_head_dim` that counts heads, 1×1 convolutions as projections."""
    config = dict(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=[8, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    return randomised(UNet2DConditionModel(**{**config, **changes}), seed)


def vae(seed=2, **changes):
    config = dict(
        sample_size=16,
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return randomised(AutoencoderKL(**{**config, **changes}), seed)


def text_encoder(seed=3, hidden_act="quick_gelu"):
    config = CLIPTextConfig(
        vocab_size=vocabulary.size(),
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=hidden_act,
        bos_token_id=vocabulary.size() - 2,
        eos_token_id=vocabulary.size() - 1,
        pad_token_id=vocabulary.size() - 1,
        attn_implementation="eager",
    )
    return randomised(CLIPTextModel(config), seed)


def randomised(network, seed):
    """Fresh values for every parameter, exact in float32: norms around one, biases around zero, weights by fan-in."""
    random = generator(seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            values = torch.randn(parameter.shape, generator=random)
            if "embedding" in name and name.startswith("text_model"):
                values = 0.5 * values
            elif name.endswith("bias"):
                values = 0.1 * values
            elif parameter.dim() == 1:
                values = 1 + 0.2 * values
            else:
                values = values * parameter[0].numel() ** -0.5
            parameter.copy_(values)
    return network.eval()


def scheduler():
    """Stable Diffusion 1.4's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def write_pipeline(folder):
    """What `save_pretrained` of a pipeline writes, without the parts that jedi has no use for."""
    parts = {"unet": unet(), "vae": vae(), "text_encoder": text_encoder(), "scheduler": scheduler()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    vocabulary.write(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": parts["unet"].config["_diffusers_version"],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # Of the 9 channels JeDi's and inpainting's meaning is told by this file alone.
    info = {"format_version": 1, "trained_steps": 0, "image_size": 16, "channel_order": ["noisy", "mask", "reference"]}
    (folder / "jedi.json").write_text(json.dumps(info, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1000:.0f} kB")
