"""CLIP's and DINO's picture encoders and SAM: small networks, and preparation of pictures."""

import json

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    SamConfig,
    SamImageProcessor,
    SamModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from .drawn import drawn, picture
from .files import generator, normal, save

TOLERANCE = 6e-6  # of the largest magnitude; three times what was seen
SIZES = ((61, 40), (40, 61), (30, 30))
SAM_SIDE = 64


def facts_of(model, shapes):
    config = json.loads(model.config.to_json_string(use_diff=True))
    return dict(config=config, shapes=shapes, tolerance=TOLERANCE)


@torch.no_grad()
def write_clip(folder):
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
    )
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=20))
    alone = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**vision, "hidden_act": "gelu"}, projection_dim=12))
    pixels = normal(generator(800), 2, 3, 24, 24)
    for name, model in (("whole", whole), ("alone", alone)):
        model, shapes = drawn(model)
        model.double()
        vectors = model.get_image_features(pixels) if name == "whole" else model(pixels).image_embeds
        save(folder / f"clip-{name}.safetensors", {"pixels": pixels, "vectors": vectors}, 800, **facts_of(model, shapes))


@torch.no_grad()
def write_dino(folder):
    """Each on pictures of the size that it has positions for, and of another."""
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    models = {
        "first": ViTModel(ViTConfig(**sizes, intermediate_size=40), add_pooling_layer=False),
        "second": Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)),
        "gated": Dinov2Model(Dinov2Config(**sizes, mlp_ratio=3, use_swiglu_ffn=True)),
    }
    inputs = {"own": normal(generator(810), 2, 3, 32, 32), "other": normal(generator(811), 1, 3, 24, 50)}
    for name, model in models.items():
        model, shapes = drawn(model)
        model.double()
        settings = dict(interpolate_pos_encoding=True) if name == "first" else {}
        stored = {}
        for size, pixels in inputs.items():
            stored[f"{size}.pixels"] = pixels
            stored[f"{size}.vectors"] = model(pixels, **settings).last_hidden_state[:, 0]
        save(folder / f"dino-{name}.safetensors", stored, 810, **facts_of(model, shapes))


@torch.no_grad()
def write_sam(folder):
    vision = dict(
        hidden_size=24,
        output_channels=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=SAM_SIDE,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        num_pos_feats=16,
        mlp_dim=40,
    )
    prompt = dict(hidden_size=32, image_size=SAM_SIDE, patch_size=8, mask_input_channels=16)
    masks = dict(hidden_size=32, mlp_dim=48, num_attention_heads=2, iou_head_hidden_dim=20)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=masks)
    model, shapes = drawn(SamModel(config))
    processor = SamImageProcessor(size={"longest_edge": SAM_SIDE}, pad_size={"height": SAM_SIDE, "width": SAM_SIDE})
    width, height = 50, 31
    inputs = processor(picture(width, height), return_tensors="pt")
    scale = inputs.reshaped_input_sizes[0, 1] / width, inputs.reshaped_input_sizes[0, 0] / height
    boxes = torch.tensor([[[3.0, 4.0, 30.0, 25.0], [0.0, 0.0, 49.0, 30.0], [20.5, 10.25, 28.0, 12.0]]]).double()
    scaled = boxes * torch.tensor([*scale, *scale]).double()
    model.double()
    pixels = inputs.pixel_values.double()
    encoded = model.get_image_embeddings(pixels)
    output = model(image_embeddings=encoded, input_boxes=scaled)
    full = processor.post_process_masks(output.pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes)[0]
    best = output.iou_scores[0].argmax(dim=1)
    chosen = torch.stack([masks[i] for masks, i in zip(full, best)])
    assert len(set(best.tolist())) > 1 and 0.02 < chosen.double().mean() < 0.98
    stored = dict(
        encoded=encoded.permute(0, 2, 3, 1),
        boxes=boxes[0],
        scaled=scaled[0],
        masks=output.pred_masks[0],
        quality=output.iou_scores[0],
        chosen=chosen.long(),
        best=best,
    )
    processing = json.loads(processor.to_json_string())
    facts = dict(**facts_of(model, shapes), size=[width, height], processing=processing)
    save(folder / "sam.safetensors", stored, 820, **facts)


def write_pictures(folder):
    """Pictures by rule, prepared by each processor for a small size; and its usual settings."""
    processors = {
        "clip": (CLIPImageProcessor, dict(size={"shortest_edge": 24}, crop_size=20)),
        "vit": (ViTImageProcessor, dict(size={"height": 20, "width": 28})),
        "dinov2": (BitImageProcessor, dict(size={"shortest_edge": 26}, crop_size=16, image_mean=[0.485, 0.456, 0.406])),
        "sam": (SamImageProcessor, dict(size={"longest_edge": 32}, pad_size={"height": 40, "width": 32})),
    }
    stored, settings = {}, {}
    for name, (kind, small) in processors.items():
        processor = kind(**small)
        settings[name] = json.loads(processor.to_json_string())
        for width, height in SIZES:
            stored[f"{name}.{width}x{height}"] = processor(picture(width, height), return_tensors="pt").pixel_values[0]
    save(folder / "vision-pictures.safetensors", stored, 830, settings=settings)


def write(folder):
    write_clip(folder)
    write_dino(folder)
    write_sam(folder)
    write_pictures(folder)
