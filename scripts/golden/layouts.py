"""The layouts that models come in: LDM's names at the full size of Stable Diffusion 1, 2 and XL, the tiny pipelines as single
files, and small networks as diffusers writes them: in shards, in half precision, with the VAE's old spelling."""

import hashlib
import json
import re
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from . import families, ldm, networks
from .files import generator, normal, save
from .vae import old_spelling

TOLERANCE = 1e-5

SD1 = dict(
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280, 1280],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
    sample_size=64,
)
SD2 = SD1 | dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True)
XL = dict(
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    layers_per_block=2,
    attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
)
VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VIT_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu")


BIG_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)


def full_size(unet, text, text_2=None):
    """Networks without weights."""
    with torch.device("meta"):
        parts = dict(unet=UNet2DConditionModel(**unet), vae=AutoencoderKL(**VAE))
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **text))
        if text_2:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=49408, **text_2))
    return parts


def folded(lines):
    """Layers that differ by their number alone in one line: `layers.*12.` are the layers 0 to 11."""
    groups = {}
    for line in lines:
        number = re.search(r"\.(?:transformer_blocks|layers|resblocks)\.(\d+)\.", line)
        pattern = re.sub(r"\.(transformer_blocks|layers|resblocks)\.\d+\.", r".\1.*.", line)
        groups.setdefault(pattern, []).append(int(number.group(1)) if number else None)
    for pattern, numbers in groups.items():
        if numbers == [None]:
            yield pattern
            continue
        assert sorted(numbers) == list(range(len(numbers))), pattern
        yield pattern.replace(".*.", f".*{len(numbers)}.")


def write_names(path, kind, parts, known=()):
    """A line a tensor: its name in diffusers, in LDM, and its shape in LDM. Returns the lines; those in `known` are not
    written again.

    Which is which is what diffusers' own conversion says: it is given tensors that hold their own number."""
    shapes = {name: value.shape for name, value in ldm.single_file(parts, kind).items()}
    order = list(shapes)
    numbered = {name: torch.tensor(float(number)).expand(shapes[name]) for number, name in enumerate(order)}
    lines = []
    for part, converted in ldm.converted_by_diffusers(numbered, parts, kind).items():
        own = parts[part].state_dict()
        expected = {name: tuple(value.shape) for name, value in own.items() if "position_ids" not in name}
        assert {name: tuple(value.shape) for name, value in converted.items()} == expected
        for name in sorted(converted):
            origin = order[int(converted[name].flatten()[0])]
            lines.append(f"{part}/{name} {origin} {'x'.join(map(str, shapes[origin]))}")
    n_tensors, lines = len(lines), list(folded(lines))
    text = "".join(line + "\n" for line in lines if line not in known)
    path.write_text(text)
    print(f"{path.name}: {n_tensors} tensors, {len(text) / 1000:.0f} kB")
    return set(lines)


def write_digests(path, kinds, parts):
    """Each tensor of a tiny pipeline as a single file, with these kinds of text encoder: shape and hash of its values."""
    digests = {}
    for kind in kinds:
        file = ldm.single_file(parts, kind)
        for part, converted in ldm.converted_by_diffusers(file, parts, kind).items():
            own = {name: value for name, value in parts[part].state_dict().items() if "position_ids" not in name}
            assert own.keys() == converted.keys()
            assert all(torch.equal(own[name], converted[name]) for name in own)
        for name, value in file.items():
            sha256 = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
            digests[name] = [list(value.shape), sha256[:16]]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(digest)}" for name, digest in sorted(digests.items()))
    path.write_text(f"{{\n{lines}\n}}\n")
    print(f"{path.name}: {len(digests)} tensors")


def small_networks():
    one_level = dict(block_out_channels=[6], attention_head_dim=2, norm_num_groups=2, in_channels=4)
    kinds = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    unet = networks.unet(seed=6, **one_level, **kinds)
    vae = networks.vae(
        seed=7,
        block_out_channels=[4],
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        norm_num_groups=2,
    )
    return unet, vae


def write_layouts(folder):
    unet, vae = small_networks()
    shutil.rmtree(folder, ignore_errors=True)
    for name, settings in {
        "sharded": dict(max_shard_size="12KB"),
        "fp16": dict(variant="fp16"),
        "fp16-sharded": dict(variant="fp16", max_shard_size="6KB"),
    }.items():
        network = unet.half() if "fp16" in name else unet
        network.save_pretrained(folder / name / "unet", **settings)
    text = networks.text_encoder().half()
    text.save_pretrained(folder / "fp16" / "text_encoder", variant="fp16")
    text.save_pretrained(folder / "fp16-sharded" / "text_encoder", variant="fp16", max_shard_size="20KB")
    vae.save_config(folder / "old-vae" / "vae")
    old = {old_spelling(name): value.contiguous() for name, value in vae.state_dict().items()}
    assert any("proj_attn" in name for name in old)
    save_file(old, folder / "old-vae" / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for name in ("sharded", "fp16-sharded"):
        assert sum(file.suffix == ".safetensors" and name in file.parts for file in files) > 2, name
    size = sum(file.stat().st_size for file in files)
    print(f"{folder.name}: {len(files)} files, {size / 1000:.0f} kB")


def write_cases(path):
    """What the small networks give; those in half precision are computed in float64 from their rounded weights."""
    random = generator(500)
    inputs = {
        "noisy": normal(random, 2, 4, 6, 4),
        "timesteps": torch.tensor([17]),
        "context": normal(random, 2, 5, networks.WIDTH),
        "picture": normal(random, 1, 3, 6, 4, scale=0.5),
    }
    stored = dict(inputs)
    timesteps = inputs["timesteps"].repeat_interleave(2)
    for name in ("eps", "eps_fp16"):
        unet, vae = small_networks()
        unet = unet.half().double() if name == "eps_fp16" else unet.double()
        stored[name] = unet(inputs["noisy"], timesteps, encoder_hidden_states=inputs["context"]).sample
    vae = vae.double()
    stored["latents"] = vae.encode(inputs["picture"]).latent_dist.mean * vae.config.scaling_factor
    stored["decoded"] = vae.decode(stored["latents"] / vae.config.scaling_factor).sample
    words = networks.text_encoder().half().double()
    stored["tokens"] = torch.randint(0, 600, (1, 12), generator=random)
    torch.set_default_dtype(torch.float64)
    stored["context_fp16"] = words(stored["tokens"]).last_hidden_state
    torch.set_default_dtype(torch.float32)
    save(path, stored, 500, tolerance=TOLERANCE)


def write(folder):
    with torch.no_grad():
        sd1 = write_names(folder / "ldm-names-sd1.txt", "clip", full_size(SD1, CLIP_L))
        # Only what differs from Stable Diffusion 1; of XL the VAE alone is the same.
        write_names(folder / "ldm-names-sd2.txt", "open_clip", full_size(SD2, VIT_H), known=sd1)
        vae = {line for line in sd1 if line.startswith("vae/")}
        write_names(folder / "ldm-names-xl.txt", "xl", full_size(XL, CLIP_L, BIG_G), known=vae)
        tiny = dict(unet=networks.unet(), vae=networks.vae(), text_encoder=networks.text_encoder())
        write_digests(folder / "ldm-tiny-pipeline.json", ["clip", "open_clip"], tiny)
        write_digests(folder / "ldm-tiny-xl.json", ["xl"], families.xl_networks())
        write_layouts(folder / "layouts")
        write_cases(folder / "layouts" / "cases.safetensors")
