#!/usr/bin/env python3
"""Writes the toybox model's tokenizer: CLIP's byte-level BPE format with a vocabulary of our own.

Every byte is a token, so that any prompt can be written; merges, from left to right, make one token of each word that
toybox captions use. Needs nothing but Python: scripts/make_toybox_tokenizer.py configs/toybox/architecture/tokenizer
"""

import json
import pathlib
import sys

WORDS = """
a an the of on in at under toy photo picture
robot cat bird mug car cactus lamp fish house rocket mushroom teapot
beach snow space city night water desert meadow forest sunset living room rain volcano
""".split()


def byte_symbols():
    """GPT-2's printable stand-in for each byte, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def merges_of(word, known):
    """Pairs that build the word from the left, the first letters first."""
    letters = [*word[:-1], word[-1] + "</w>"]
    left = letters[0]
    for right in letters[1:]:
        if (left, right) not in known:
            known.append((left, right))
        left += right


def main(folder):
    merges = []
    for word in WORDS:
        merges_of(word, merges)
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == len(set(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    config |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(len(tokens), "tokens")


main(pathlib.Path(sys.argv[1]))
