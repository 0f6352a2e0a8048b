#!/usr/bin/env python3
"""Holds the networks of `synth-data` to diffusers and transformers at the sizes that are published, on random weights.

    cargo build --release
    venv/bin/python scripts/check_sizes.py --photo FILE                   # all of them: 17 GB of memory, 16 GB of disk, an hour
    venv/bin/python scripts/check_sizes.py --photo FILE --only BLIP-2     # one

The environment of check_models.py, which does the same for Stable Diffusion 1.4 and for small networks of every family;
Grounding DINO, SAM, CLIP and DINO are in check_vision.py. Weights are stored in half precision, as published ones are, and
both sides compute in float32, one after the other. Errors are shares of the largest output. Exits with 1 if any is too large
or a token of a caption is another one.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTokenizer,
)

from check_models import TOLERANCE, Jedi, Model, Report, outputs, remove, tokens_of, write_folder
from golden import captions, layouts, networks

BIG_G = {name: value for name, value in layouts.BIG_G.items() if name != "hidden_act"}
# Name: U-Net, text encoders, their kind, channels, side of the latents.
FAMILIES = {
    "SD inpainting": (layouts.SD1, [layouts.CLIP_L], "clip", 9, 64),
    "InstructPix2Pix": (layouts.SD1, [layouts.CLIP_L], "clip", 8, 64),
    "SDXL": (layouts.XL, [layouts.CLIP_L, BIG_G], "xl", 4, 128),
}
PROMPT = "a photo of"
NEW_TOKENS = 16


def check_family(name, jedi, room):
    """A pipeline as a folder and as a single file."""
    unet, texts, kind, channels, latent = FAMILIES[name]
    model = Model(name, unet, layouts.VAE, texts, kind, channels, "epsilon", latent)
    folder, file, first = room / "folder", room / "single.safetensors", time.monotonic()
    for part in model.parts().values():
        part.half()
    write_folder(model, folder)
    save_file(model.single_file(), file)
    names = ["tokenizer", "tokenizer_2"][: len(texts)]
    model.tokens = {
        name.replace("tokenizer", "tokens"): torch.tensor([tokens_of(CLIPTokenizer.from_pretrained(folder / name))])
        for name in names
    }
    for part in model.parts().values():
        part.float()
    start = time.monotonic()
    expected = outputs(model, model.parts())
    seconds = time.monotonic() - start
    print(f"{name}: {sum(p.numel() for part in model.parts().values() for p in part.parameters()) / 1e9:.2f} G parameters, ", end="")
    for part in model.parts().values():
        part.to("meta")
    gc.collect()
    print(f"written in {start - first:.0f} s, PyTorch {seconds:.0f} s", flush=True)
    report = Report()
    for layout, path, flags in (("folder", folder, ()), ("single file", file, ("--tokenizer", folder / "tokenizer"))):
        start = time.monotonic()
        found = jedi.outputs(model, path, *flags)
        for tokens, ids in model.tokens.items():
            assert torch.equal(found[tokens], ids), (layout, found[tokens])
        report.line(model, "read", f"{layout}, f16, {time.monotonic() - start:.0f} s", found, expected)
    remove(folder)
    remove(file)
    return report.failed


def blip(folder):
    """Salesforce/blip-image-captioning-large."""
    tokenizer, _ = captions.word_piece_tokenizer(folder)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    text = dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072)
    text |= dict(num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512, bos_token_id=30522)
    config = BlipConfig(vision_config=dict(**vision, image_size=384, patch_size=16), text_config=dict(**text, is_decoder=True))
    network = networks.randomised(BlipForConditionalGeneration(config), 21)
    captions.louder(network, "position_embeddings.weight", 3.0)
    captions.louder(network, "query.weight", 3.0)
    return network, BlipProcessor(BlipImageProcessor(), tokenizer), 384


def blip2(_folder):
    """Salesforce/blip2-opt-2.7b."""
    tokenizer = captions.byte_pair_tokenizer()
    text = dict(model_type="opt", vocab_size=50304, hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240)
    text |= dict(num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=2048)
    # Vision tower and Q-Former: transformers' defaults are the published ones.
    config = Blip2Config(text_config=text, num_query_tokens=32, image_token_index=50265)
    network = networks.randomised(Blip2ForConditionalGeneration(config), 22)
    captions.louder(network, "language_projection.weight", 4.0)
    size = {"height": 224, "width": 224}
    return network, Blip2Processor(BlipImageProcessor(size=size), tokenizer, num_query_tokens=32), 224


@torch.no_grad()
def described(network, pixels, rows, beams):
    """Features, scores behind the prompt, and what is found: what `jedi inspect caption --outputs` tells."""
    found = {"features": network.vision_model(pixels).last_hidden_state}
    asked = dict(max_new_tokens=NEW_TOKENS, num_beams=beams)
    if isinstance(network, Blip2ForConditionalGeneration):
        found["logits"] = network(pixels, rows).logits
        ids, used = network.generate(pixels, input_ids=rows.clone(), **asked)[0], rows.shape[1]
    else:
        # The last token of a prompt ends it, and is taken off; the first one is another for captions.
        ids, used = network.generate(pixels, input_ids=rows.clone(), **asked)[0], rows.shape[1] - 1
        asked_of = rows[:, :-1].clone()
        asked_of[:, 0] = network.config.text_config.bos_token_id
        found["logits"] = network(pixels, asked_of).logits
    return found | {"ids": ids[used:]}


def check_captioner(name, jedi, room, photo):
    folder, picture = room / "captioner", room / "photo.png"
    folder.mkdir()
    network, processor, side = {"BLIP": blip, "BLIP-2": blip2}[name](folder)
    # Cut, not resized: that photographs are resized alike is tested elsewhere.
    image = Image.open(photo).convert("RGB")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image.crop((left, top, left + side, top + side)).save(picture)
    pixels = processor.image_processor(Image.open(picture), return_tensors="pt").pixel_values
    captions.write_folder(folder, network.half(), processor, "2GB")
    network.float()
    print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e9:.2f} G parameters", flush=True)
    text = processor.tokenizer(PROMPT, return_tensors="pt").input_ids
    if name == "BLIP":
        start = torch.tensor([[network.config.text_config.bos_token_id, network.config.text_config.sep_token_id]])
        prompts = {"": start, PROMPT: text}
    else:
        seen = torch.full((1, 32), network.config.image_token_index)
        prompts = {"": torch.cat([seen, torch.tensor([[2]])], dim=1), PROMPT: torch.cat([seen, text], dim=1)}
    cases = [("", 1), (PROMPT, 1), (PROMPT, 5)]
    start = time.monotonic()
    expected = [described(network, pixels, prompts[prompt], beams) for prompt, beams in cases]
    print(f"  PyTorch {time.monotonic() - start:.0f} s", flush=True)
    del network
    gc.collect()
    failed = False
    for (prompt, beams), expected in zip(cases, expected):
        start, out = time.monotonic(), room / "out.safetensors"
        arguments = ["--model", folder, "--image", picture, "--prompt", prompt, "--beams", beams, "--max-tokens", NEW_TOKENS]
        jedi.run("inspect", "caption", *arguments, "--outputs", out, "--device", "cpu")
        found, figures = {key.removesuffix(".0"): value for key, value in load_file(out).items()}, []
        for key, value in (("pixels", pixels), ("features", expected["features"]), ("logits", expected["logits"])):
            assert found[key].shape == value.shape, (key, found[key].shape, value.shape)
            figures.append(((found[key] - value).abs().max() / value.abs().max()).item())
        ids = expected["ids"][: len(found["ids"])].tolist()
        is_same = found["ids"].tolist() == ids
        failed |= not (is_same and max(figures) <= TOLERANCE)
        print(
            f"  prompt {prompt!r}, {beams} beams: pixels, features, logits "
            + ", ".join(f"{figure:.1e}" for figure in figures)
            + f"; {len(ids)} tokens ({len(set(ids))} different) {'the same' if is_same else 'NOT THE SAME'}"
            + f"; jedi {time.monotonic() - start:.0f} s, loading included",
            flush=True,
        )
    remove(folder)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jedi", default=Path(__file__).parents[1] / "target" / "release" / "jedi", type=Path)
    parser.add_argument("--photo", type=Path, required=True, help="a photograph of 384×384 pixels at least")
    every = [*FAMILIES, "BLIP", "BLIP-2"]
    parser.add_argument("--only", choices=every, help="one of them")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = []
    for name in every if arguments.only is None else [arguments.only]:
        with tempfile.TemporaryDirectory() as room:
            jedi = Jedi(arguments.jedi, Path(room))
            is_family = name in FAMILIES
            if check_family(name, jedi, Path(room)) if is_family else check_captioner(name, jedi, Path(room), arguments.photo):
                failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all within tolerance")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
