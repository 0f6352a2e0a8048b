#!/usr/bin/env python3
"""Holds Grounding DINO, SAM, CLIP and DINO, and what stands around them, to transformers on photographs.

    cargo build --release
    venv/bin/python scripts/check_vision.py --photos DIR                 # small networks, a picture of every folder in DIR
    venv/bin/python scripts/check_vision.py --photos DIR --full --base   # the published sizes, one picture

The environment of make_golden.py. Nothing is downloaded: weights are drawn. Both sides compute in float32. The first way
is about preparation of pictures (at the published sizes), thresholds, phrases and the choice of masks; the second about
the networks, and needs some gigabytes of memory. Which positions become queries is decided by scores that may differ in
the last bit: with --full transformers takes those that jedi chose (how many it would have chosen otherwise is told).
"""

import argparse
import json
import os
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
    GroundingDinoProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoObjectDetectionOutput

from golden import drawn, grounding

TOLERANCES = dict(map=1e-5, text=1e-5, enhanced=3e-5, queries=1e-4, logits=1e-4, boxes=1e-4, chosen=1e-4, vectors=2e-5)
PHRASES = ["a red toy", "small dogs", "cat"]
SHAPES = ((512, 512), (512, 384), (300, 512), (512, 211), (97, 131))  # photographs are cut to these by turns
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


class Check:
    """What both ways share: where things lie, what failed."""

    def __init__(self, room, binary):
        self.room, self.binary, self.failures = room, binary, []

    def model(self, name, model, processor):
        model, _ = drawn.drawn(model)
        model.save_pretrained(self.room / name)
        processor.save_pretrained(self.room / name)
        return model

    def jedi(self, *arguments, told=False):
        """What `jedi inspect` prints."""
        start, out, err = time.time(), self.room / "stdout", self.room / "stderr"
        with out.open("w") as stdout, err.open("w") as stderr:
            command = [self.binary, "inspect", *map(str, arguments), "--device", "cpu"]
            child, ended, peak = subprocess.Popen(command, stdout=stdout, stderr=stderr), 0, 0
            while not ended:
                # What wait4 tells of memory counts this process's own in.
                status = Path(f"/proc/{child.pid}/status").read_text()
                peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
                time.sleep(0.01)
                ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        assert status == 0, err.read_text()
        if told:
            seconds, cpu = time.time() - start, usage.ru_utime + usage.ru_stime
            print(f"  jedi: {seconds:.1f} s, {cpu:.1f} s of CPU, {peak / 1e6:.2f} GB, loading included")
        return out.read_text()

    def row(self, what, figure, holds):
        print(f"  {what:44} {figure}" + ("" if holds else "  FAILED"))
        if not holds:
            self.failures.append(what)

    def compare(self, name, found, expected):
        found, expected = found.double(), expected.double()
        finite = torch.isfinite(expected)
        assert torch.equal(finite, torch.isfinite(found)), name
        share = ((found - expected)[finite].abs().max() / expected[finite].abs().max()).item()
        tolerance = next(value for part, value in TOLERANCES.items() if name.startswith(part))
        self.row(name, f"{share:.1e} of the largest magnitude (tolerance {tolerance:.0e})", share <= tolerance)


def jedis_masks(check, found, model, inputs, processor):
    """Boxes of a call through transformers' SAM: its masks of the best score, and these scores, beside jedi's."""
    scale = (inputs.reshaped_input_sizes / inputs.original_sizes)[0].flip(0).repeat(2)
    start = time.process_time()
    with torch.no_grad():
        output = model(pixel_values=inputs.pixel_values, input_boxes=(found["edges"] * scale)[None].float())
    seconds = time.process_time() - start
    full = processor.post_process_masks(output.pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes)[0]
    best = output.iou_scores[0].argmax(dim=1)
    # jedi's choice: the one of the masks that its mask is most like.
    differ = (full != found["masks"].bool()[:, None]).double().mean(dim=(2, 3))
    scores = output.iou_scores[0].gather(1, best[:, None])[:, 0].clamp(0, 1)
    n_same = (differ.argmin(dim=1) == best).sum().item()
    n, apart = len(best), differ.gather(1, best[:, None]).max().item()
    gap = (found["mask_scores"] - scores).abs().max().item()
    return n, n_same, sorted(set(best.tolist())), apart, gap, seconds


# Photographs through small networks.


def small_embedders(check, pictures):
    """Preparation at the published sizes, and what networks of these families make of it."""
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=224)
    clip = dict(vision_config=dict(**small, intermediate_size=48, patch_size=32), text_config=dict(num_hidden_layers=1))
    for name, model, processor in (
        ("clip", CLIPModel(CLIPConfig(**clip, projection_dim=24)), CLIPImageProcessor()),
        ("dino vit", ViTModel(ViTConfig(**small, intermediate_size=48), add_pooling_layer=False), vit_processor()),
        ("dinov2", Dinov2Model(Dinov2Config(**small, patch_size=14)), dinov2_processor()),
    ):
        model, outputs = check.model(name, model, processor), check.room / "vectors.safetensors"
        images = [argument for picture in pictures for argument in ("--image", picture)]
        check.jedi("similarity", "--model", check.room / name, *images, "--outputs", outputs)
        found, off, apart = load_file(outputs), 0.0, 0.0
        for i, picture in enumerate(pictures):
            pixels = processor(Image.open(picture), return_tensors="pt").pixel_values
            off = max(off, (found[f"pixels.{i}"] - pixels).abs().max().item())
            with torch.no_grad():
                vector = model.get_image_features(pixels) if name == "clip" else model(pixels).last_hidden_state[:, 0]
            apart = max(apart, (found["vectors"][i] - vector[0] / vector.norm()).abs().max().item())
        # One of 255 levels that is off would be 0.014.
        check.row(f"{name}: prepared pictures", f"differ by {off:.1e} at most, a level is 1.4e-02", off < 1e-5)
        check.row(f"{name}: vectors of unit length", f"differ by {apart:.1e} at most", apart < 1e-5)


def decoding(check, photos):
    """JPEG files are read by another decoder than Pillow's."""
    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8), False)
    check.model("eye", model, ViTImageProcessor(do_resize=False, do_normalize=False))
    images = [argument for photo in photos for argument in ("--image", photo)]
    outputs = check.room / "raw.safetensors"
    check.jedi("similarity", "--model", check.room / "eye", *images, "--outputs", outputs)
    found, most, n_off, n_all = load_file(outputs), 0, 0, 0
    for i, photo in enumerate(photos):
        expected = torch.frombuffer(bytearray(Image.open(photo).convert("RGB").tobytes()), dtype=torch.uint8)
        own = (found[f"pixels.{i}"][0].permute(1, 2, 0) * 255).round().flatten()
        off = (own - expected).abs()
        most, n_off, n_all = max(most, off.max().item()), n_off + (off > 0).sum().item(), n_all + off.numel()
    check.row("JPEG files as read", f"{n_off / n_all:.1%} of the colours differ from Pillow's, by {most:.0f} of 255 at most", most <= 8)


def within_gap(values, share):
    """A threshold near this share of the values, in the widest gap there, so that no last bit decides."""
    values = values.flatten().sort().values
    middle = int(share * (len(values) - 1))
    first, last = max(middle - 12, 0), min(middle + 12, len(values) - 1)
    at = first + (values[first + 1 : last + 1] - values[first:last]).argmax().item()
    return ((values[at] + values[at + 1]) / 2).item()


def matched(own, expected):
    """Findings of both sides whose boxes are each other's nearest; their order hangs on last bits."""
    boxes = torch.tensor([thing["box"] for thing in own]), torch.stack([box for _, box, _ in expected])
    apart = torch.cdist(*boxes, p=torch.inf)
    nearest, back = apart.argmin(dim=1), apart.argmin(dim=0)
    return [(thing, expected[j]) for i, (thing, j) in enumerate(zip(own, nearest.tolist())) if back[j] == i]


def small_objects(check, pictures):
    """The whole way from photograph to boxes, phrases and masks."""
    image_processor = GroundingDinoImageProcessor()
    model = check.model("dino", grounding.network(num_queries=100)[0], image_processor)
    tokenizer = grounding.write_tokenizer(check.room / "dino")
    processor = GroundingDinoProcessor(image_processor, tokenizer)
    sam = dict(hidden_size=24, output_channels=32, num_hidden_layers=3, num_attention_heads=3, image_size=256)
    sam.update(patch_size=16, window_size=7, global_attn_indexes=[1], num_pos_feats=16, mlp_dim=48)
    prompt = dict(hidden_size=32, image_size=256, patch_size=16, mask_input_channels=16)
    masks = dict(hidden_size=32, mlp_dim=48, num_attention_heads=2, iou_head_hidden_dim=24)
    sam = SamModel(SamConfig(vision_config=sam, prompt_encoder_config=prompt, mask_decoder_config=masks))
    cutter = SamImageProcessor(size={"longest_edge": 256}, pad_size={"height": 256, "width": 256})
    sam = check.model("sam", sam, cutter)
    inputs = tokenizer(" ".join(f"{phrase}." for phrase in PHRASES), return_tensors="pt")
    n_found = n_other = n_same_phrases = n_own = n_masks = n_same_masks = 0
    off = px = score = apart = gap = 0.0
    different, choices = set(), set()
    for picture in pictures:
        image = Image.open(picture)
        pixels = image_processor(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            output = model(pixel_values=pixels, **inputs)
        scores = output.logits[0, :, : inputs.input_ids.shape[1]].sigmoid()
        best = scores.max(dim=1).values
        limit = within_gap(best, 0.7)
        word_limit = within_gap(scores[best > limit][:, 1:], 0.6)
        arguments = ["--model", check.room / "dino", "--segmenter", check.room / "sam", "--image", picture]
        arguments += [argument for phrase in PHRASES for argument in ("--phrase", phrase)]
        arguments += ["--threshold", limit, "--word-threshold", word_limit, "--json", "--out", check.room / "out.png"]
        outputs = check.room / "objects.safetensors"
        lines = check.jedi("objects", *arguments, "--outputs", outputs).splitlines()
        own, found = [json.loads(line) for line in lines], load_file(outputs)
        off = max(off, (found["pixels"] - pixels).abs().max().item())
        settings = dict(threshold=limit, text_threshold=word_limit, target_sizes=[image.size[::-1]])

        def processed(logits, boxes):
            answer = GroundingDinoObjectDetectionOutput(logits=logits, pred_boxes=boxes, input_ids=inputs.input_ids)
            result = processor.post_process_grounded_object_detection(answer, **settings)[0]
            return list(zip(result["scores"].tolist(), result["boxes"], result["text_labels"]))

        # Of jedi's answers: thresholds, phrases and boxes alone.
        padded = torch.full((1, found["logits"].shape[1], 256), -torch.inf)
        padded[:, :, : found["logits"].shape[2]] = found["logits"]
        answers = processed(padded, found["boxes"])
        pairs = matched(own, answers)
        n_own += len(answers) == len(own) == len(pairs) and all(a["phrase"] == b[2] for a, b in pairs)
        expected = processed(output.logits, output.pred_boxes)
        n_found, pairs = n_found + len(expected), matched(own, expected)
        n_other += len(expected) + len(own) - 2 * len(pairs)
        for thing, (value, box, phrase) in pairs:
            n_same_phrases += thing["phrase"] == phrase
            different.add(phrase)
            score = max(score, abs(thing["score"] - value))
            px = max(px, (torch.tensor(thing["box"]) - box).abs().max().item())
        n, n_same, chosen, most, most_gap, _ = jedis_masks(check, found, sam, cutter(image, return_tensors="pt"), cutter)
        n_masks, n_same_masks, apart, gap = n_masks + n, n_same_masks + n_same, max(apart, most), max(gap, most_gap)
        choices |= set(chosen)
    n = len(pictures)
    check.row("Grounding DINO: prepared pictures", f"differ by {off:.1e} at most, a level is 1.7e-02", off < 1e-5)
    check.row("  post-processing of the same answers", f"the same phrases in {n_own} of {n} pictures", n_own == n)
    check.row("  findings above the threshold", f"{n_found}, {n_other} of them on one side alone", n_other == 0)
    line = f"{n_same_phrases} of {n_found} the same, {len(different)} different ones"
    check.row("  their phrases", line, n_same_phrases == n_found and len(different) > 3)
    check.row("  their scores and boxes", f"differ by {score:.1e} and {px:.1e} px at most", score < 1e-4 and px < 0.1)
    line = f"{n_same_masks} of {n_masks}; numbers {sorted(choices)} are chosen"
    check.row("SAM: the mask that is chosen is the same", line, n_same_masks == n_masks and len(choices) > 1)
    line = f"{apart:.1e} of the pixels of a mask differ at most, scores by {gap:.1e}"
    check.row("  masks in the picture's size", line, apart < 1e-3 and gap < 1e-4)


# The published sizes.


def vit_processor():
    """facebook/dino-vits16's."""
    return ViTImageProcessor(**IMAGENET)


def dinov2_processor():
    return BitImageProcessor(size={"shortest_edge": 256}, crop_size=224, **IMAGENET)


def full_grounding(check, image, base):
    """IDEA-Research/grounding-dino-tiny and -base."""
    tiny = dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224)
    large = dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12, image_size=384)
    print(f"grounding-dino-{'base' if base else 'tiny'}")
    backbone = SwinConfig(**(large if base else tiny), out_indices=[2, 3, 4])
    config = GroundingDinoConfig(backbone_config=backbone, text_config=BertConfig())
    folder, outputs = check.room / "full-dino", check.room / "objects.safetensors"
    processor = GroundingDinoImageProcessor()
    model = check.model(folder.name, GroundingDinoForObjectDetection(config), processor)
    tokenizer = grounding.write_tokenizer(folder)
    arguments = ["--model", folder, "--image", image, "--phrase", "a red toy", "--phrase", "small dogs"]
    arguments += ["--threshold", 1, "--out", check.room / "objects.png", "--outputs", outputs]
    check.jedi("objects", *arguments, told=True)
    found = load_file(outputs)
    inputs = tokenizer("a red toy. small dogs.", return_tensors="pt")
    assert torch.equal(found.pop("tokens"), inputs.input_ids)
    pixels = processor(Image.open(image), return_tensors="pt").pixel_values
    topk = torch.topk

    def chosen(values, count, dim):
        own = topk(values, count, dim=dim).indices
        jedis = found["chosen"]
        n_other = len(set(jedis[0].tolist()) - set(own[0].tolist()))
        n_moved = (own != jedis).sum().item()
        print(f"  {n_moved} of {count} queries stand elsewhere in transformers' own order, {n_other} are others")
        return values.gather(dim, jedis), jedis

    start = time.process_time()
    expected = grounding.stages(model, pixels, inputs, topk=chosen)
    print(f"  transformers: {time.process_time() - start:.1f} s of CPU, {tuple(pixels.shape)}")
    expected["logits"] = expected.pop("logits.0")[None]
    for name in sorted(set(expected) - {"chosen", "chosen_scores"}):
        check.compare(name, found[name], expected[name])


def full_sam(check, image):
    """facebook/sam-vit-base: the pixels of the masks, for boxes of a small detector."""
    print("sam-vit-base")
    folder, small, outputs = check.room / "full-sam", check.room / "small-dino", check.room / "masks.safetensors"
    processor = SamImageProcessor()
    model = check.model(folder.name, SamModel(SamConfig()), processor)
    finder = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    check.model(small.name, grounding.network()[0], finder)
    grounding.write_tokenizer(small)
    arguments = ["--model", small, "--segmenter", folder, "--image", image, "--phrase", "a toy", "--threshold", 0]
    check.jedi("objects", *arguments, "--out", check.room / "masks.png", "--outputs", outputs, told=True)
    inputs = processor(Image.open(image), return_tensors="pt")
    n, n_same, chosen, apart, gap, seconds = jedis_masks(check, load_file(outputs), model, inputs, processor)
    print(f"  transformers: {seconds:.1f} s of CPU, {n} boxes")
    check.row("the mask that is chosen is the same", f"{n_same} of {n}; numbers {chosen} are chosen", n_same == n)
    line = f"{apart:.1e} of the pixels of a mask differ at most, scores by {gap:.1e}"
    check.row("masks in the picture's size", line, apart < 1e-3 and gap < 1e-3)


def full_embedders(check, image):
    """openai/clip-vit-large-patch14 and -base-patch32 (their picture halves), facebook/dino-vits16 and dinov2-base."""
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    text = dict(text_config=dict(num_hidden_layers=1))
    vit = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    for name, model, processor in (
        ("clip-vit-large-patch14", CLIPModel(CLIPConfig(vision_config=large, projection_dim=768, **text)), CLIPImageProcessor()),
        ("clip-vit-base-patch32", CLIPModel(CLIPConfig(projection_dim=512, **text)), CLIPImageProcessor()),
        ("dino-vits16", ViTModel(vit, add_pooling_layer=False), vit_processor()),
        ("dinov2-base", Dinov2Model(Dinov2Config(image_size=518, patch_size=14)), dinov2_processor()),
    ):
        print(name)
        model, outputs = check.model(name, model, processor), check.room / "vectors.safetensors"
        arguments = ["--model", check.room / name, "--image", image, "--image", image, "--outputs", outputs]
        check.jedi("similarity", *arguments, told=True)
        pixels = processor(Image.open(image), return_tensors="pt").pixel_values
        start = time.process_time()
        with torch.no_grad():
            vector = model.get_image_features(pixels) if name[0] == "c" else model(pixels).last_hidden_state[:, 0]
        print(f"  transformers: {time.process_time() - start:.1f} s of CPU a picture")
        check.compare("vectors", load_file(outputs)["vectors"][:1], vector / vector.norm())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=Path(__file__).parents[1] / "target" / "release" / "jedi", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="a folder with folders of JPEG files")
    parser.add_argument("--full", action="store_true", help="networks of the published sizes")
    parser.add_argument("--only", default="grounding,sam,embedders", help="with --full: which")
    parser.add_argument("--base", action="store_true", help="with --full: grounding-dino-base instead of tiny")
    arguments = parser.parse_args()
    photos = sorted(min(folder.glob("*.jpg")) for folder in arguments.photos.iterdir() if any(folder.glob("*.jpg")))
    assert photos, f"{arguments.photos}: has no folder with JPEG files"
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), arguments.binary)
        pictures = []
        for i, photo in enumerate(photos):
            image, (width, height) = Image.open(photo).convert("RGB"), SHAPES[i % len(SHAPES)]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            pictures.append(check.room / f"{i}.png")
            image.crop((left, top, left + width, top + height)).save(pictures[-1])
        if arguments.full:
            for name in arguments.only.split(","):
                if name == "grounding":
                    full_grounding(check, pictures[1], arguments.base)
                else:
                    {"sam": full_sam, "embedders": full_embedders}[name](check, pictures[1])
        else:
            print(f"{len(pictures)} photographs")
            decoding(check, photos)
            small_embedders(check, pictures)
            small_objects(check, pictures)
    print("failed: " + ", ".join(check.failures) if check.failures else "all within tolerance")
    return 1 if check.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
