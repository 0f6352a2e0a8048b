#!/usr/bin/env python3
"""Holds Grounding DINO, SAM, CLIP and DINOv2 at the published sizes, with drawn weights, to transformers.

    cargo build --release
    venv/bin/python scripts/check_vision.py                     # grounding-dino-tiny, sam-vit-base, clip-l/14, dinov2-base
    venv/bin/python scripts/check_vision.py --only grounding --base --image some.jpg

The environment of make_golden.py. Nothing is downloaded; a few gigabytes of memory are needed. Both sides compute
in float32. Which positions become queries is decided by scores that may differ in the last bit, so transformers takes
those that jedi chose (how many it would have chosen otherwise is told), and each stage is compared from there on.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SwinConfig,
)

from golden import drawn, grounding

TOLERANCES = dict(map=1e-5, text=1e-5, enhanced=3e-5, queries=1e-4, logits=1e-4, boxes=1e-4, chosen=1e-4, vectors=2e-5)


def write_model(folder, model, processor):
    model, _ = drawn.drawn(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def jedi(arguments, binary):
    start = time.time()
    run = subprocess.run([binary, "inspect", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(f"jedi inspect {arguments[0]}: {time.time() - start:.1f} s, loading included")
    return run.stdout


def compare(name, found, expected, failures):
    found, expected = found.double(), expected.double()
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(found)), name
    share = ((found - expected)[finite].abs().max() / expected[finite].abs().max()).item()
    tolerance = next(value for part, value in TOLERANCES.items() if name.startswith(part))
    print(f"  {name:18} {share:.1e} of the largest magnitude (tolerance {tolerance:.0e})")
    if not share <= tolerance:
        failures.append(name)


def check_grounding(room, image, binary, base, failures):
    """Sizes of IDEA-Research/grounding-dino-tiny and -base."""
    tiny = dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224)
    large = dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12, image_size=384)
    backbone = SwinConfig(**(large if base else tiny), out_indices=[2, 3, 4])
    config = GroundingDinoConfig(backbone_config=backbone, text_config=BertConfig())
    folder, outputs = room / "dino", room / "objects.safetensors"
    processor = GroundingDinoImageProcessor()
    model = write_model(folder, GroundingDinoForObjectDetection(config), processor)
    tokenizer = grounding.write_tokenizer(folder)
    arguments = ["objects", "--model", folder, "--image", image, "--phrase", "a red toy", "--phrase", "small dogs"]
    arguments += ["--threshold", 1, "--out", room / "objects.png", "--outputs", outputs, "--device", "cpu"]
    jedi(arguments, binary)
    found = load_file(outputs)
    inputs = tokenizer("a red toy. small dogs.", return_tensors="pt")
    assert torch.equal(found.pop("tokens"), inputs.input_ids)
    pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt").pixel_values
    topk = torch.topk

    def chosen(values, count, dim):
        own = topk(values, count, dim=dim).indices
        jedis = found["chosen"]
        n_other = len(set(jedis[0].tolist()) - set(own[0].tolist()))
        print(f"  {(own != jedis).sum().item()} of {count} queries stand elsewhere in transformers' own order, {n_other} are others")
        return values.gather(dim, jedis), jedis

    start = time.time()
    expected = grounding.stages(model, pixels, inputs, topk=chosen)
    print(f"transformers: {time.time() - start:.1f} s, {tuple(pixels.shape)}")
    expected["logits"] = expected.pop("logits.0")[None]
    for name in sorted(set(expected) - {"chosen", "chosen_scores"}):
        compare(name, found[name], expected[name], failures)


def check_sam(room, image, binary, failures):
    """Sizes of facebook/sam-vit-base: the pixels of the masks, for boxes of a small detector."""
    folder, small, outputs = room / "sam", room / "small-dino", room / "masks.safetensors"
    processor = SamImageProcessor()
    model = write_model(folder, SamModel(SamConfig()), processor)
    write_model(small, grounding.network()[0], GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}))
    grounding.write_tokenizer(small)
    arguments = ["objects", "--model", small, "--segmenter", folder, "--image", image, "--phrase", "a toy", "--threshold", 0]
    jedi([*arguments, "--out", room / "masks.png", "--outputs", outputs, "--device", "cpu"], binary)
    found = load_file(outputs)
    inputs = processor(Image.open(image).convert("RGB"), return_tensors="pt")
    scale = (inputs.reshaped_input_sizes / inputs.original_sizes)[0].flip(0).repeat(2)
    start = time.time()
    with torch.no_grad():
        output = model(pixel_values=inputs.pixel_values, input_boxes=(found["edges"] * scale)[None].float())
    print(f"transformers: {time.time() - start:.1f} s, {len(found['edges'])} boxes")
    full = processor.post_process_masks(output.pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes)[0]
    best = output.iou_scores[0].argmax(dim=1)
    expected = torch.stack([masks[i] for masks, i in zip(full, best)])
    differ = (found["masks"].bool() != expected).double().mean().item()
    scores = output.iou_scores[0].gather(1, best[:, None])[:, 0].clamp(0, 1)
    gap = (found["mask_scores"] - scores).abs().max().item()
    print(f"  masks: {expected.double().mean():.0%} of the pixels are in; {differ:.1e} differ; scores by {gap:.1e} at most")
    if differ > 1e-3 or gap > 1e-3:
        failures.append("sam")


def check_embedders(room, image, binary, failures):
    """Sizes of openai/clip-vit-large-patch14 (its picture half) and facebook/dinov2-base."""
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=dict(num_hidden_layers=1), projection_dim=768))
    dino = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    imagenet = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    for name, model, processor in (
        ("clip", clip, CLIPImageProcessor()),
        ("dinov2", dino, BitImageProcessor(size={"shortest_edge": 256}, crop_size=224, **imagenet)),
    ):
        model = write_model(room / name, model, processor)
        outputs = room / f"{name}.safetensors"
        jedi(["similarity", "--model", room / name, "--image", image, "--image", image, "--outputs", outputs], binary)
        pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt").pixel_values
        with torch.no_grad():
            vector = model.get_image_features(pixels) if name == "clip" else model(pixels).last_hidden_state[:, 0]
        compare(f"vectors of {name}", load_file(outputs)["vectors"][:1], vector / vector.norm(), failures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=Path(__file__).parents[1] / "target" / "release" / "jedi", type=Path)
    parser.add_argument("--only", default="grounding,sam,embedders")
    parser.add_argument("--base", action="store_true", help="grounding-dino-base instead of tiny")
    parser.add_argument("--image", type=Path, help="a picture of your own [default: one by rule, 640x480]")
    arguments = parser.parse_args()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        image = arguments.image or room / "picture.png"
        if not arguments.image:
            Image.fromarray(drawn.picture(640, 480)).save(image)
        for name in arguments.only.split(","):
            print(name)
            if name == "grounding":
                check_grounding(room, image, arguments.binary, arguments.base, failures)
            elif name == "sam":
                check_sam(room, image, arguments.binary, failures)
            else:
                check_embedders(room, image, arguments.binary, failures)
    print("failed: " + ", ".join(failures) if failures else "all within tolerance")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
