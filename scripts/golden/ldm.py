"""Stable Diffusion's own names (LDM), built as CompVis' and OpenCLIP's code builds the networks, and checked by letting
diffusers convert the result back."""

import torch
from diffusers.loaders import single_file_utils as single

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
OPEN_CLIP.update({"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"})

# The text encoders of a file: whose names they have, and what stands in front.
TEXTS = {
    "clip": {"text_encoder": ("clip", "cond_stage_model.transformer.")},
    "open_clip": {"text_encoder": ("open_clip", "cond_stage_model.model.")},
    "xl": {
        "text_encoder": ("clip", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
    },
}


def unet_modules(network):
    """(LDM's module, diffusers' module) in the order in which openaimodel.py appends its blocks."""
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    if hasattr(network, "add_embedding"):
        yield "label_emb.0.0", "add_embedding.linear_1"
        yield "label_emb.0.2", "add_embedding.linear_2"
    yield "input_blocks.0.0", "conv_in"
    number = 1
    for i, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            yield f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{j}"
            if hasattr(block, "attentions"):
                yield f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{j}"
            number += 1
        if block.downsamplers:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            number += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    number = 0
    for i, block in enumerate(network.up_blocks):
        for j in range(len(block.resnets)):
            layers = [f"up_blocks.{i}.resnets.{j}"]
            if hasattr(block, "attentions"):
                layers.append(f"up_blocks.{i}.attentions.{j}")
            if block.upsamplers and j + 1 == len(block.resnets):
                layers.append(f"up_blocks.{i}.upsamplers.0")
            for position, layer in enumerate(layers):
                yield f"output_blocks.{number}.{position}", layer
            number += 1
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def vae_modules(network):
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    for side in ("encoder", "decoder"):
        for ldm, diffusers in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{side}.{ldm}", f"{side}.{diffusers}"
        yield f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"
        yield f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        yield f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"
    levels = len(network.encoder.down_blocks)
    for i, block in enumerate(network.encoder.down_blocks):
        for j in range(len(block.resnets)):
            yield f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}"
        yield f"encoder.down.{i}.downsample", f"encoder.down_blocks.{i}.downsamplers.0"
    for i, block in enumerate(network.decoder.up_blocks):
        for j in range(len(block.resnets)):
            yield f"decoder.up.{levels - 1 - i}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}"
        yield f"decoder.up.{levels - 1 - i}.upsample", f"decoder.up_blocks.{i}.upsamplers.0"


def renamed(state, modules, inside):
    """The tensors of the modules under their LDM names, and which tensor of diffusers each is."""
    found, origin = {}, {}
    for ldm, diffusers in modules:
        for name in [name for name in state if name.startswith(diffusers + ".")]:
            rest = name[len(diffusers) + 1 :]
            for theirs, own in inside(diffusers).items():
                if rest.startswith(theirs + "."):
                    rest = own + rest[len(theirs) :]
                    break
            found[f"{ldm}.{rest}"], origin[f"{ldm}.{rest}"] = state[name], [name]
    assert len(found) == len(state), set(state) - {name for names in origin.values() for name in names}
    return found, origin


def unet_to_ldm(network, state):
    return renamed(state, unet_modules(network), lambda module: RESNET if ".resnets." in module else {})


def vae_to_ldm(network, state):
    shortcut = {"conv_shortcut": "nin_shortcut"}
    inside = lambda module: ATTENTION if ".attentions." in module else shortcut
    found, origin = renamed(state, vae_modules(network), inside)
    for name, value in found.items():
        if ".attn_1." in name and value.dim() == 2:
            found[name] = value[:, :, None, None]
    return found, origin


def open_clip_to_ldm(network, state):
    found, origin = {}, {}

    def put(name, value, names):
        found[name], origin[name] = value, names

    root = "text_model."
    put("token_embedding.weight", state[root + "embeddings.token_embedding.weight"], [])
    put("positional_embedding", state[root + "embeddings.position_embedding.weight"], [])
    for kind in ("weight", "bias"):
        put(f"ln_final.{kind}", state[f"{root}final_layer_norm.{kind}"], [])
        for i in range(network.config.num_hidden_layers):
            theirs, own = f"{root}encoder.layers.{i}.", f"transformer.resblocks.{i}."
            for layer, ldm in OPEN_CLIP.items():
                put(f"{own}{ldm}.{kind}", state[f"{theirs}{layer}.{kind}"], [])
            fused = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            put(f"{own}attn.in_proj_{kind}", torch.cat(fused), [])
    if "text_projection.weight" in state:
        # OpenCLIP multiplies by the matrix from the right, transformers keeps a linear layer.
        put("text_projection", state["text_projection.weight"].T, [])
        return found, origin
    # What Stable Diffusion 2 does not use: the last layer, as zeros.
    last = network.config.num_hidden_layers
    for name in [name for name in found if name.startswith("transformer.resblocks.0.")]:
        put(name.replace("resblocks.0.", f"resblocks.{last}."), torch.zeros_like(found[name]), [])
    return found, origin


def single_file(parts, kind):
    """A whole model under LDM's names: `model.diffusion_model.…` and so on. `kind`: clip, open_clip or xl."""
    states = {name: network.state_dict() for name, network in parts.items()}
    file = {"model.diffusion_model." + name: value for name, value in unet_to_ldm(parts["unet"], states["unet"])[0].items()}
    file |= {"first_stage_model." + name: value for name, value in vae_to_ldm(parts["vae"], states["vae"])[0].items()}
    for part, (names, prefix) in TEXTS[kind].items():
        state = states[part]
        own = open_clip_to_ldm(parts[part], state)[0] if names == "open_clip" else state
        file |= {prefix + name: value for name, value in own.items()}
    return file


def text_by_diffusers(file, part, kind, network):
    """The state dict that diffusers makes of a text encoder in such a file."""
    names, prefix = TEXTS[kind][part]
    own = {name: value for name, value in file.items() if name.startswith(prefix)}
    if names == "clip":
        return single.convert_ldm_clip_checkpoint(own)
    # Of Stable Diffusion 2's diffusers leaves out layer 23 by name, so that a smaller network's last must go first.
    last = f"{prefix}transformer.resblocks.{network.config.num_hidden_layers}."
    return single.convert_open_clip_checkpoint(network, {n: v for n, v in own.items() if not n.startswith(last)}, prefix)


def converted_by_diffusers(file, parts, kind):
    """The state dicts that diffusers makes of such a file."""
    converted = {
        "unet": single.convert_ldm_unet_checkpoint(dict(file), parts["unet"].config),
        "vae": single.convert_ldm_vae_checkpoint(dict(file), parts["vae"].config),
    }
    return converted | {part: text_by_diffusers(file, part, kind, parts[part]) for part in TEXTS[kind]}
