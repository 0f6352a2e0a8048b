"""Tiny random language models in GGUF files, and what transformers makes of them: ids of a chat, scores, greedy ids."""

import json

import gguf
import numpy
import torch
from gguf.quants import quantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from .files import generator, save
from .vocabulary import CORPUS

# Three times what was seen; candle rounds the inputs of quantised layers to eight bits too.
TOLERANCES = {"qwen3": 1e-5, "llama": 0.15}
SYSTEM, USER = "You write prompts.", "A teapot, it's 12345 years old!\n\nTwo  spaces."
NEW_TOKENS = 10
VOCABULARY = 320
# Words of a text before they are merged, of Qwen2's tokenizer.json and of Llama 3's.
SPLITS = {
    "qwen3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
PLAIN, CONTROL = 1, 3


def tokenizer_of(kind):
    """Bytes and merges, then the special tokens; `<think>` is an ordinary added token in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 10, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS, "1234 12 34 123"], trainer)
    tokenizer.add_special_tokens(SPECIAL[kind])
    return tokenizer


def chat_text(kind):
    """As the models' own templates lay it out; Qwen3 with thinking switched off."""
    if kind == "qwen3":
        turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
        return turns + "<think>\n\n</think>\n\n"
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = f"{head.format('system')}{SYSTEM}<|eot_id|>{head.format('user')}{USER}<|eot_id|>{head.format('assistant')}"
    return "<|begin_of_text|>" + turns


def write_file(path, kind, tokenizer):
    random = generator(920 if kind == "qwen3" else 930)
    width, inner, layers = 32, 64, 2
    heads, groups, head = (2, 1, 128) if kind == "qwen3" else (4, 2, 8)
    vocabulary = tokenizer.get_vocab_size()
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    if kind == "qwen3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    else:
        writer.add_rope_dimension_count(head)
    tokens = [tokenizer.id_to_token(index) for index in range(vocabulary)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    special = SPECIAL[kind]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if kind == "qwen3" else "llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([CONTROL if token in special else PLAIN for token in tokens])
    writer.add_bos_token_id(tokens.index(special[0]))
    writer.add_eos_token_id(tokens.index(special[-1]))
    writer.add_chat_template("{# enable_thinking #}" if kind == "qwen3" else "{# plain #}")

    def matrix(name, rows, columns, scale=1.0):
        values = torch.randn(rows, columns, generator=random) * scale * columns**-0.5
        if kind == "qwen3":
            return writer.add_tensor(name, values.numpy().astype(numpy.float16))
        packed = quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def norm(name, size):
        writer.add_tensor(name, (1 + 0.2 * torch.randn(size, generator=random)).numpy())

    matrix("token_embd.weight", vocabulary, width, 4.0)
    norm("output_norm.weight", width)
    matrix("output.weight", vocabulary, width, 6.0)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight", width)
        matrix(f"{block}.attn_q.weight", heads * head, width, 2.0)
        matrix(f"{block}.attn_k.weight", groups * head, width, 2.0)
        matrix(f"{block}.attn_v.weight", groups * head, width, 2.0)
        matrix(f"{block}.attn_output.weight", width, heads * head, 2.0)
        if kind == "qwen3":
            norm(f"{block}.attn_q_norm.weight", head)
            norm(f"{block}.attn_k_norm.weight", head)
        norm(f"{block}.ffn_norm.weight", width)
        matrix(f"{block}.ffn_gate.weight", inner, width, 2.0)
        matrix(f"{block}.ffn_up.weight", inner, width, 2.0)
        matrix(f"{block}.ffn_down.weight", width, inner, 2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def write(folder):
    tensors, facts = {}, {}
    for kind in ("qwen3", "llama"):
        tokenizer = tokenizer_of(kind)
        path = folder / f"{kind}.gguf"
        write_file(path, kind, tokenizer)
        network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
        ids = torch.tensor([tokenizer.encode(chat_text(kind), add_special_tokens=False).ids])
        with torch.no_grad():
            logits = network(ids).logits[:, -1]
            # Token 0 is one of the question's: without a mask it would be taken for filling.
            greedy = network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
            )
        new = greedy[0, ids.shape[1] :]
        print(kind, new.tolist(), logits.topk(3).values.tolist())
        tensors.update({f"{kind}.ids": ids, f"{kind}.logits": logits, f"{kind}.greedy": new})
        facts[kind] = dict(tolerance=TOLERANCES[kind], text=tokenizer.decode(new.tolist()))
    save(folder / "language.safetensors", tensors, 920, system=SYSTEM, user=USER, models=facts)
