"""CLIP's text encoder with gradients, and token ids of many strings."""

import json

import torch
from transformers import CLIPTokenizer, CLIPTokenizerFast

from . import networks, vocabulary
from .files import digest, generator, gradients_by_name, normal, save

TOLERANCE, GRADIENT_TOLERANCE = 1.2e-6, 3e-6  # three times what was seen

STRINGS = [
    "",
    "a photo of a red toy car on the table",
    "A PHOTO of The Dog",
    "  two   spaces\tand a tab\nand a line  ",
    "it's the cat's ball, isn't it? they've, we'll, I'm, you're, he'd",
    "IT'S SHOUTED, THEY'VE",
    "don't stop-motion 'quoted' \"double\"",
    "café naïve Ångström über",
    "cafe\u0301 decomposed",
    "12 dogs, 345 cats and 6.78 hats in 2024",
    "3d-render_of x^2 + y^2 = z^2 (50% off!) #tag @user &amp; http://a.b/c?d=e",
    "!!! ... ?!? --- ***",
    "a 🐶 dog 🚗🚗 and a 👩‍🚀",
    "日本語のテキスト 한국어 русский ΑΒΓ",
    "<|endoftext|> inside <|startoftext|> text",
    "non\u00a0breaking\u200bzero\u3000ideographic",
    "control\u0007char",
    "x",
    "sunglasses " * 40,
    "the dog " * 90,
]


def write_tokens(folder):
    """`tokens.json`: each string with its 77 ids as the pipelines of diffusers ask for them.

    The ids are those of transformers' tokenizer in Rust, its only one from version 5 on. `slow` says whether the older
    one in Python agrees, which without `ftfy` splits ideographs and drops invisible characters, unlike OpenAI's own.
    """
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tiny-pipeline" / "tokenizer")
    slow = CLIPTokenizer.from_pretrained(folder / "tiny-pipeline" / "tokenizer")
    assert slow.fix_text is None, "uninstall ftfy: it changes what `slow` says"
    cases = []
    for string in STRINGS:
        settings = dict(padding="max_length", max_length=networks.TOKENS, truncation=True)
        ids = tokenizer(string, **settings).input_ids
        assert len(ids) == networks.TOKENS
        cases.append({"text": string, "slow": slow(string, **settings).input_ids == ids, "ids": ids})
    lines = ",\n".join(json.dumps(case) for case in cases)
    (folder / "tokens.json").write_text(f"[\n{lines}\n]\n")
    print(f"tokens.json: {len(cases)} strings, the slow tokenizer agrees on {sum(case['slow'] for case in cases)}")


def context_of(network, tokens):
    # transformers builds the causal mask in the default type, which must hold the lowest float64.
    torch.set_default_dtype(torch.float64)
    try:
        return network(tokens).last_hidden_state
    finally:
        torch.set_default_dtype(torch.float32)


def write(folder):
    write_tokens(folder)
    random = generator(400)
    tokens = torch.randint(0, vocabulary.size() - 2, (2, networks.TOKENS), generator=random)
    tokens[:, 0] = vocabulary.size() - 2
    tokens[0, 9:] = tokens[1, 30:] = vocabulary.size() - 1
    direction = normal(random, 2, networks.TOKENS, networks.WIDTH)
    for activation in ("quick_gelu", "gelu"):
        network = networks.text_encoder(hidden_act=activation).double()
        context = context_of(network, tokens)
        gradients = gradients_by_name(network, (context * direction).mean())
        tensors = {"tokens": tokens, "direction": direction, "context": context}
        if activation == "quick_gelu":
            tensors.update({f"grad.{name}": value for name, value in gradients.items()})
        else:
            tensors["gradients"] = digest(gradients)
        facts = dict(tolerance=TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE, hidden_act=activation)
        save(folder / f"text-{activation.replace('_', '-')}.safetensors", tensors, 400, **facts)
