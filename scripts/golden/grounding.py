"""Grounding DINO: every stage of small networks, preparation of pictures, and what becomes of the answers."""

import json

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_grounding_dino import get_size_with_aspect_ratio
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoObjectDetectionOutput

from .drawn import drawn, picture
from .files import generator, normal, save

TOLERANCE = 6e-6  # of each stage's largest magnitude; three times what was seen
WORDS = "a the toy red blue dog cat car robot on of photo ##s ##ish , - ' ! 2 cafe green tea ##pot ##y small".split()
TEXTS = ["a red toy. small dogs.", "robot."]
STRINGS = [
    "a red toy.",
    "A Photo of the CAT, on the reddish car!",
    "teapot . toys . dog ?",
    "  caf\u00e9\u0301   toy-cat 2 2.5 unknownword \u65e5\u672c",
    "[SEP] toy [PAD] red [MASK]",
    "",
]


def write_tokenizer(folder):
    """BERT's own numbers for what the network knows by number (`[CLS]`, `[SEP]`, `.`, `?`), a few words between."""
    tokens = [f"[unused{i}]" for i in range(1040)]
    tokens[0], tokens[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens[1012], tokens[1029] = ".", "?"
    tokens[200 : 200 + len(WORDS)] = WORDS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), clean_up_tokenization_spaces=True)
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink()
    return tokenizer


def network(**changes):
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=3, out_indices=[2, 3]
    )
    text = BertConfig(
        vocab_size=1040,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    config = dict(
        d_model=64,
        num_queries=12,
        encoder_layers=2,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_layers=3,
        decoder_ffn_dim=40,
        decoder_attention_heads=4,
        encoder_n_points=2,
        decoder_n_points=3,
        max_text_len=32,
    )
    config = GroundingDinoConfig(backbone_config=backbone, text_config=text, **{**config, **changes})
    return drawn(GroundingDinoForObjectDetection(config))


@torch.no_grad()
def stages(model, pixels, inputs, topk=torch.topk):
    """The answers of one call and what it went through; `topk` chooses the queries."""
    kept, usual = {}, torch.topk

    def keep(name):
        return lambda module, arguments, output: kept.__setitem__(name, output)

    def kept_topk(values, count, dim):
        kept["topk"] = topk(values, count, dim=dim)
        return kept["topk"]

    hooks = [
        model.model.backbone.conv_encoder.register_forward_hook(keep("maps")),
        model.model.text_projection.register_forward_hook(keep("text")),
    ]
    torch.topk = kept_topk
    try:
        output = model(pixel_values=pixels, **inputs)
    finally:
        torch.topk = usual
        [hook.remove() for hook in hooks]
    found = {f"map.{i}": features.permute(0, 2, 3, 1) for i, (features, _) in enumerate(kept["maps"])}
    found["text"] = kept["text"]
    found["enhanced_picture"] = output.encoder_last_hidden_state_vision
    found["enhanced_text"] = output.encoder_last_hidden_state_text
    found["chosen_scores"], found["chosen"] = kept["topk"]
    found["chosen_boxes"] = output.init_reference_points
    found["queries"] = output.last_hidden_state
    found["boxes"] = output.pred_boxes
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        found[f"logits.{i}"] = output.logits[i, :, : mask.sum()]
    return found


def write_networks(folder, tokenizer):
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    pixels = normal(generator(700), 2, 3, 50, 70)
    for name, changes in {
        "plain": {},
        "own-heads": dict(decoder_bbox_embed_share=False, activation_function="gelu", encoder_layers=1, num_queries=5),
    }.items():
        model, shapes = network(**changes)
        if name == "plain":
            model.config.save_pretrained(folder / "tiny-grounding")
        found = stages(model.double(), pixels, inputs)
        if name != "plain":
            found = {key: found[key] for key in ("chosen", "boxes", "logits.0", "logits.1")}
        config = json.loads(model.config.to_json_string(use_diff=True))
        tensors = {"input_ids": inputs.input_ids, **found}
        if name == "plain":
            tensors["pixels"] = pixels
        facts = dict(config=config, shapes=shapes, lengths=inputs.attention_mask.sum(1).tolist(), tolerance=TOLERANCE)
        save(folder / f"grounding-{name}.safetensors", tensors, 700, **facts)


def write_answers(folder, tokenizer):
    """Scores, boxes and phrases from made-up logits; texts and their tokens."""
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(), tokenizer)
    ids = tokenizer("a red toy. small dogs. teapot, cat.").input_ids
    logits = torch.full((1, 40, 256), -torch.inf)
    logits[:, :, : len(ids)] = normal(generator(710), 1, 40, len(ids), scale=1.5).float() - 4
    boxes = torch.rand(1, 40, 4, generator=generator(711))
    output = GroundingDinoObjectDetectionOutput(logits=logits, pred_boxes=boxes, input_ids=torch.tensor([ids]))
    stored, facts = {"logits": logits[:, :, : len(ids)], "boxes": boxes}, {"ids": ids}
    for name, (threshold, text_threshold) in {"low": (0.1, 0.15), "high": (0.35, 0.2)}.items():
        settings = dict(threshold=threshold, text_threshold=text_threshold, target_sizes=[(333, 517)])
        result = processor.post_process_grounded_object_detection(output, **settings)[0]
        assert 0 < len(result["scores"]) < 40
        stored[f"{name}.scores"], stored[f"{name}.boxes"] = result["scores"], result["boxes"]
        facts[name] = dict(threshold=threshold, text_threshold=text_threshold, phrases=result["text_labels"])
    facts["texts"] = [dict(text=text, ids=tokenizer(text).input_ids) for text in STRINGS]
    save(folder / "grounding-answers.safetensors", stored, 710, **facts)


def write_pictures(folder):
    """Sizes by the published rule, and pictures by rule prepared for a small size."""
    GroundingDinoImageProcessor().save_pretrained(folder / "tiny-grounding")
    stored, sizes = {}, []
    small = GroundingDinoImageProcessor(size={"shortest_edge": 24, "longest_edge": 40})
    for width, height in ((61, 40), (40, 61), (30, 90), (24, 24), (17, 12), (300, 200)):
        stored[f"{width}x{height}"] = small(picture(width, height), return_tensors="pt").pixel_values[0]
    for width, height in ((640, 480), (480, 640), (1024, 1024), (1333, 799), (2000, 300), (501, 333), (800, 800), (799, 1600)):
        new_height, new_width = get_size_with_aspect_ratio((height, width), 800, 1333)
        sizes.append([[width, height], [new_width, new_height]])
    save(folder / "grounding-pictures.safetensors", stored, 720, sizes=sizes)


def write(folder):
    tokenizer = write_tokenizer(folder / "tiny-grounding")
    write_networks(folder, tokenizer)
    write_answers(folder, tokenizer)
    write_pictures(folder)
