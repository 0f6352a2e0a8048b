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
    "what a dog! two dogs!! a!b !? 'yes!'",
    "a 🇩🇪 flag, a 👨‍👩‍👧‍👦 family, 👍🏽 and ❤️",
    "z\u0338\u0322a\u0337\u0321l\u0335\u0328g\u0338o\u0337 n\u0303o\u0308",
    "&lt;b&gt;bold&lt;/b&gt; &quot;red&quot; &#39;toy&#39; &amp;amp; &nbsp;",
    "tab\x0bvertical\x0cfeed\r\nline \x00null \x1b[31mred \x7f",
    "\ufeffmark \u2028line \u200ejoin\u200d soft\u00adhyphen",
    "İstanbul STRASSE ẞ ǅ ﬁne ﬂat Ω Å",
    "½ cup, 10² m, Ⅷ, ١٢٣, 四 and ①",
    "שלום עולם مرحبا नमस्ते สวัสดี",
    "1,000.50€ £5 ¥7 ©®™ § ¿qué? ¡no!",
    "<|endoftext|><|endoftext|> <|ENDOFTEXT|> <|start",
    "x",
    "the toy! " * 40,
    "sunglasses " * 40,
    "the dog " * 90,
]


def write_tokens(folder):
    """`tokens.json`: each string with its 77 ids as the pipelines of diffusers ask for them.

    The ids are those of transformers' tokenizer in Rust, its only one from version 5 on. `slow` says whether the older
    one in Python agrees, which without `ftfy` splits ideographs and drops invisible characters, unlike OpenAI's own.
    `ids_2` are those of a tokenizer that pads with `!`, as Stable Diffusion 2 and the second one of XL do.
    """
    source = folder / "tiny-pipeline" / "tokenizer"
    tokenizer, slow = CLIPTokenizerFast.from_pretrained(source), CLIPTokenizer.from_pretrained(source)
    tokenizer_2 = CLIPTokenizerFast.from_pretrained(source, pad_token="!")
    assert slow.fix_text is None, "uninstall ftfy: it changes what `slow` says"
    cases = []
    for string in STRINGS:
        settings = dict(padding="max_length", max_length=networks.TOKENS, truncation=True)
        ids, ids_2 = (of(string, **settings).input_ids for of in (tokenizer, tokenizer_2))
        assert len(ids) == len(ids_2) == networks.TOKENS
        agrees = slow(string, **settings).input_ids == ids
        cases.append({"text": string, "slow": agrees, "ids": ids, "ids_2": ids_2})
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
