"""A small vocabulary in CLIP's format: the bytes, the bytes that end a word, merges learnt from a few sentences."""

import json
from collections import Counter
from functools import cache

from transformers import CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
MERGES = 90
CORPUS = """a photo of a red toy car on the table . a photo of the small blue dog in the snow . the dog wears a hat .
it's the cat's yellow ball , isn't it ? they've painted a painting of the old house and the tree in the garden .
two pictures of one and the same toy , a wooden horse , on the beach , in the kitchen , under the water .
a café in the naïve style . the photograph shows a teddy bear wearing sunglasses at night ."""


@cache
def merges():
    """Byte-pair merges, the most frequent pair first, ties by spelling."""
    words = [tuple(word[:-1]) + (word[-1] + "</w>",) for word in CORPUS.split() if word.isascii()]
    learnt = []
    for _ in range(MERGES):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        words = [merged(word, best) for word in words]
    return learnt


def merged(word, pair):
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def tokens():
    """In CLIP's order: bytes, bytes at the end of a word, merges, the two special tokens."""
    bytes_ = list(bytes_to_unicode().values())
    return bytes_ + [byte + "</w>" for byte in bytes_] + ["".join(pair) for pair in merges()] + SPECIAL


def size():
    return len(tokens())


def write(folder):
    """The files of a diffusers `tokenizer/` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens())}
    assert len(vocab) == size(), "two merges spell the same token"
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges()]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=77)
    tokenizer.save_pretrained(folder)
