"""BLIP and BLIP-2: features, logits, and the ids that greedy and beam search give, from the folders that transformers writes."""

import json
import shutil

import numpy
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

from .files import generator, save
from .networks import randomised
from .vocabulary import CORPUS

TOLERANCE = 3e-6  # three times what was seen
SIDE = 28
PROMPT = "a photo of"
NEW_TOKENS = 12
# (beams, exponent of the length)
SEARCHES = [(1, 1.0), (2, 1.0), (5, 1.0), (3, 0.0), (3, 2.0), (4, -1.0)]
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=7,
)


def pictures(random):
    """Larger and smaller than the network's, wide and high; one is photograph-like, the others noise."""
    noise = [torch.randint(0, 256, (*size, 3), generator=random) for size in ((37, 50), (20, 11))]
    y, x = torch.meshgrid(torch.arange(64), torch.arange(48), indexing="ij")
    smooth = torch.stack([4 * y, 5 * x, (x * y) % 256], dim=-1) % 256
    return [smooth, *noise]


def byte_pair_tokenizer():
    """In the shape of OPT's: bytes, merges, a start token in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def word_piece_tokenizer(folder):
    """In the shape of BERT's: a few words, letters, letters inside words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'!?-"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "photo", "picture", "toy", "the", "of", "dog", "and", "is"]
    vocabulary = [*words, *letters, *(f"##{letter}" for letter in letters), "##ing", "##s2"]
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(vocab_file=str(file))
    file.unlink()
    return tokenizer, len(vocabulary)


def blip2():
    tokenizer = byte_pair_tokenizer()
    queries = dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        cross_attention_frequency=2,
    )
    text = dict(
        model_type="opt",
        vocab_size=len(tokenizer) + 1,  # the picture's token, which the processor adds
        hidden_size=20,
        word_embed_proj_dim=20,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=40,
    )
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=queries,
        text_config=text,
        num_query_tokens=5,
        image_token_index=len(tokenizer),
    )
    network = randomised(Blip2ForConditionalGeneration(config), 900)
    return network, Blip2Processor(BlipImageProcessor(size=SQUARE), tokenizer, num_query_tokens=5)


SQUARE = {"height": SIDE, "width": SIDE}


def blip(folder):
    tokenizer, size = word_piece_tokenizer(folder)
    text = dict(
        vocab_size=size + 2,  # the token that starts a caption, and one that is not used
        hidden_size=24,
        encoder_hidden_size=VISION["hidden_size"],
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=40,
        bos_token_id=size,
        sep_token_id=tokenizer.sep_token_id,
        eos_token_id=2,
        pad_token_id=0,
        is_decoder=True,
    )
    network = randomised(BlipForConditionalGeneration(BlipConfig(vision_config=VISION, text_config=text)), 910)
    return network, BlipProcessor(BlipImageProcessor(size=SQUARE), tokenizer)


def in_double(function):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            return function()
    finally:
        torch.set_default_dtype(torch.float32)


def louder(network, suffix, scale):
    """Small random networks hardly prefer one token to another; captions would all be the same."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(suffix):
                parameter.mul_(scale)


def inputs_of(processor, random):
    shown = pictures(random)
    images = [Image.fromarray(numpy.uint8(picture.numpy())) for picture in shown]
    tensors = {f"picture.{index}": picture for index, picture in enumerate(shown)}
    pixels = torch.cat([processor.image_processor(image, return_tensors="pt").pixel_values for image in images])
    return {**tensors, "pixels": pixels}


def searches(network, pixels, tensors, prompts):
    """The ids of every search."""
    facts = []
    for prompt, ids in prompts.items():
        rows = ids.repeat(len(pixels), 1)
        for beams, exponent in SEARCHES:
            found = in_double(
                lambda: network.generate(
                    pixels.double(),
                    input_ids=rows.clone(),
                    max_new_tokens=NEW_TOKENS,
                    num_beams=beams,
                    length_penalty=exponent,
                )
            )
            name = f"{prompt}.{beams}.{exponent}"
            tensors[f"ids.{name}"] = found
            facts.append({"prompt": prompt, "beams": beams, "length_exponent": exponent, "ids": f"ids.{name}"})
    return facts


def write_folder(folder, network, processor, shard):
    shutil.rmtree(folder, ignore_errors=True)
    network.save_pretrained(folder, max_shard_size=shard)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "added_tokens.json").unlink(missing_ok=True)


def end_token(network, pixels, prompt):
    """A token that a greedy caption comes to in its middle, so that captions end, and at different lengths."""
    rows = prompt.repeat(len(pixels), 1)
    greedy = in_double(lambda: network.generate(pixels.double(), input_ids=rows.clone(), max_new_tokens=NEW_TOKENS))
    new = greedy[:, -NEW_TOKENS:].tolist()
    first = {token: row.index(token) for row in new for token in row}
    return max((token for token in first if 4 <= first[token] <= 8), key=lambda token: (sum(token in row for row in new), token))


def write_blip2(folder):
    random = generator(901)
    network, processor = blip2()
    louder(network, "language_projection.weight", 4.0)
    louder(network, "fc2.weight", 3.0)
    tensors = inputs_of(processor, random)
    pixels = tensors["pixels"]
    text = processor.tokenizer(PROMPT, return_tensors="pt").input_ids
    image = torch.full((1, 5), network.config.image_token_index)
    start = torch.tensor([[2]])
    prompts = {"none": torch.cat([image, start], dim=1), "photo": torch.cat([image, text], dim=1)}
    network.double()
    end = end_token(network, pixels, prompts["none"])
    for config in (network.config.text_config, network.language_model.config, network.language_model.generation_config):
        config.eos_token_id = end
    vision = in_double(lambda: network.vision_model(pixels.double()).last_hidden_state)
    prefix, _, queries = in_double(lambda: network.get_image_features(pixels.double(), return_dict=True))
    rows = prompts["photo"].repeat(len(pixels), 1)
    logits = in_double(lambda: network(pixels.double(), rows).logits)
    tensors.update(vision=vision, queries=queries.last_hidden_state, prefix=prefix, logits=logits, prompt=text)
    cases = searches(network, pixels, tensors, prompts)
    write_folder(folder / "blip2", network.float(), processor, "30KB")
    captions(processor, tensors, cases, {"none": 6, "photo": 5 + text.shape[1]}, end)
    save(folder / "blip2-cases.safetensors", tensors, 900, tolerance=TOLERANCE, cases=cases, end=end, n_prefix=5)


def captions(processor, tensors, cases, starts, end):
    """Up to the end token, which is a word here; transformers fills the rows behind it."""

    def cut(row, start):
        return row[: row.index(end, start) + 1] if end in row[start:] else row

    for case in cases:
        ids = tensors[case["ids"]]
        rows = [cut(row, starts[case["prompt"]]) for row in ids.tolist()]
        # Not all that Python's strip takes for spaces: \x1c to \x1f are not such to Unicode.
        case["captions"] = [text.strip(" \t\n\v\f\r") for text in processor.batch_decode(rows, skip_special_tokens=True)]
        print(case["prompt"], case["beams"], case["length_exponent"], [len(set(row.tolist())) for row in ids])


def write_blip(folder):
    random = generator(911)
    (folder / "blip").mkdir(exist_ok=True)
    network, processor = blip(folder / "blip")
    louder(network, "position_embeddings.weight", 3.0)
    louder(network, "query.weight", 6.0)
    tensors = inputs_of(processor, random)
    pixels = tensors["pixels"]
    start = network.config.text_config.bos_token_id
    text = processor.tokenizer(PROMPT, return_tensors="pt").input_ids
    prompts = {"none": torch.tensor([[start, 3]]), "photo": text}
    network.double()
    end = end_token(network, pixels, prompts["none"])
    network.config.text_config.sep_token_id = end
    vision = in_double(lambda: network.vision_model(pixels.double()).last_hidden_state)
    rows = text[:, :-1].repeat(len(pixels), 1)
    rows[:, 0] = start
    logits = in_double(lambda: network(pixels.double(), rows).logits)
    tensors.update(vision=vision, logits=logits, prompt=text)
    cases = searches(network, pixels, tensors, prompts)
    write_folder(folder / "blip", network.float(), processor, "1MB")
    captions(processor, tensors, cases, {"none": 1, "photo": text.shape[1] - 1}, end)
    save(folder / "blip-cases.safetensors", tensors, 910, tolerance=TOLERANCE, cases=cases, end=end, n_prefix=0)


def write(folder):
    write_blip2(folder)
    write_blip(folder)
    for name in ("blip", "blip2"):
        for file in sorted((folder / name).iterdir()):
            if file.suffix == ".json":
                file.write_text(json.dumps(json.loads(file.read_text()), indent=2, ensure_ascii=False) + "\n")
        size = sum(file.stat().st_size for file in (folder / name).iterdir())
        print(f"{name}: {size / 1000:.0f} kB")
