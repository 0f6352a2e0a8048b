"""Whole networks in diffusers and transformers, with SDPA and random weights; variants as in torch_operations.py."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from . import place
from . import torch_operations as operations

ROOT = Path(__file__).parents[2]
FOLDERS = {"sd14": ROOT / "benches" / "sd14", "toybox": ROOT / "configs" / "toybox" / "architecture"}
TRAINED = ROOT / "configs" / "toybox" / "model"


def config(model, component):
    fields = json.loads((FOLDERS[model] / component / "config.json").read_text())
    return {name: value for name, value in fields.items() if not name.startswith("_")}


class Coupled:
    """Self-attention across the images of a set (JeDi, supplement, section 6)."""

    def __init__(self, images):
        self.images, self.attend = images, AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
        total, l, d = hidden_states.shape
        joined = hidden_states.reshape(total // self.images, self.images * l, d)
        return self.attend(attn, joined, **rest).reshape(total, l, d)


def couple(network, images):
    processors = {
        name: Coupled(images) if ".attn1." in name else AttnProcessor2_0() for name in network.attn_processors
    }
    assert any(isinstance(processor, Coupled) for processor in processors.values())
    network.set_attn_processor(processors)
    return network


def unet_of(model, images):
    """Made without PyTorch's own initialisation, which takes long for 860 M parameters."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**config(model, "unet"))
    network = network.to_empty(device=place.device)
    assert not list(network.buffers()), "a buffer would be left without its values"
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
    return couple(network, images)


def text_encoder_of(model):
    return CLIPTextModel(CLIPTextConfig(**config(model, "text_encoder"), attn_implementation="sdpa"))


class Formats:
    """Runs on one network in either memory format; changing it is not timed."""

    def __init__(self, network, run):
        self.network, self.run, self.held, self.compiled = network, run, None, None

    def variants(self):
        """On a GPU as it is and compiled, for compiling takes a minute each time; channels last is what tensor cores want."""
        if place.is_gpu():
            return {"eager": self.runner(torch.channels_last), "compiled": self.runner(torch.channels_last, is_compiled=True)}
        return {"contiguous": self.runner(torch.contiguous_format), "channels_last": self.runner(torch.channels_last)}

    def runner(self, memory_format, is_compiled=False):
        def run():
            if is_compiled and self.compiled is None:
                self.network.compile()
                self.compiled = self.network._compiled_call_impl
            # What `compile` leaves on the module: taken off, the module is as it was.
            self.network._compiled_call_impl = self.compiled if is_compiled else None
            if self.held != memory_format:
                self.network.to(memory_format=memory_format)
                self.held = memory_format
            return self.run(memory_format)

        return run


def precision_of(case):
    """PyTorch's own way to bf16: matrix products in it, what needs f32 in f32."""
    in_bf16 = case.get("dtype") == "bf16" or place.is_gpu()
    return (lambda: torch.autocast(place.device.partition(":")[0], dtype=torch.bfloat16)) if in_bf16 else nullcontext


def unet(case):
    is_forward = case["pass"] == "forward"
    network = unet_of(case["model"], case["images"]).train(not is_forward).requires_grad_(not is_forward)
    if case.get("checkpointing"):
        network.enable_gradient_checkpointing()
    if is_forward:
        network = network.to(place.dtype())
    total, side = case["sets"] * case["images"], case["size"] // 8
    made = place.dtype() if is_forward else torch.float32
    picture = torch.randn(total, network.config.in_channels, side, side)
    tokens = config(case["model"], "text_encoder").get("max_position_embeddings", 77)
    picture, context = picture.to(made), torch.randn(total, tokens, network.config.cross_attention_dim, dtype=made)
    timesteps = torch.full((total,), 500)
    # A network in bf16 needs no autocast to be one.
    precision = nullcontext if is_forward and place.is_gpu() else precision_of(case)
    parameters = list(network.parameters())
    update = (operations.optimizer(parameters, fused=True), operations.averages(parameters)) if case.get("update") else None

    def predict(memory_format):
        x = picture.contiguous(memory_format=memory_format)
        with torch.no_grad(), precision():
            started = place.clock()
            network(x, timesteps, encoder_hidden_states=context, return_dict=False)
            return place.clock() - started

    def differentiate(memory_format):
        x = picture.contiguous(memory_format=memory_format)
        started = place.clock()
        with precision():
            output = network(x, timesteps, encoder_hidden_states=context, return_dict=False)[0].float()
        forward = place.clock()
        output.square().mean().backward()
        if update:
            operations.update(parameters, *update)
        ended = place.clock()
        network.zero_grad(set_to_none=True)
        return ended - (started if case["pass"] == "both" else forward)

    return Formats(network, predict if is_forward else differentiate).variants()


def train_step(case):
    """The toybox recipe: loss over sets with dropped references, U-Net and text encoder trained together."""
    total, n = case["images"], case["set_size"]
    network, text = unet_of("toybox", n).train(), text_encoder_of("toybox").train()
    parameters = [*network.parameters(), *text.parameters()]
    scheduler = DDIMScheduler.from_config(json.loads((FOLDERS["toybox"] / "scheduler/scheduler_config.json").read_text()))
    c, side = network.config.out_channels, network.config.sample_size
    clean = torch.randn(total, c, side, side)
    tokens = torch.randint(0, text.config.vocab_size, (total, text.config.max_position_embeddings))
    kinds = {"fused": dict(fused=True), "foreach": dict(foreach=True)}
    updates = {name: operations.optimizer(parameters, **kind) for name, kind in kinds.items()}
    ema = operations.averages(parameters)
    precision = precision_of(case)

    def step(memory_format, kind):
        started = place.clock()
        timesteps = torch.randint(0, 1000, (total // n,)).repeat_interleave(n)
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        mask = (torch.rand(total, 1, 1, 1) < 0.5).float()
        joined = torch.cat([noisy, mask.expand(-1, 1, side, side), clean * (1 - mask)], dim=1)
        joined = joined.contiguous(memory_format=memory_format)
        with precision():
            context = text(tokens).last_hidden_state
            prediction = network(joined, timesteps, encoder_hidden_states=context, return_dict=False)[0].float()
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        # jedi looks at its loss too, to stop when it is no number.
        assert torch.isfinite(loss)
        operations.update(parameters, updates[kind], ema)
        return place.clock() - started

    variants = {}
    for kind in kinds:
        formats = Formats(network, lambda memory_format, kind=kind: step(memory_format, kind)).variants()
        variants.update({f"{name}, {kind}": run for name, run in formats.items()})
    return variants


def vae_decode(case):
    network = AutoencoderKL(**config("sd14", "vae")).eval().requires_grad_(False).to(place.dtype())
    side = case["size"] // 8
    latents = torch.randn(case["images"], network.config.latent_channels, side, side, dtype=place.dtype())

    def decode(memory_format):
        x = latents.contiguous(memory_format=memory_format)
        with torch.no_grad():
            started = place.clock()
            network.decode(x / network.config.scaling_factor, return_dict=False)
            return place.clock() - started

    return Formats(network, decode).variants()


def text_encoder(case):
    network = text_encoder_of("sd14").eval().requires_grad_(False).to(place.dtype())
    length = network.config.max_position_embeddings
    tokens = torch.arange(case["prompts"] * length) * 7919 % network.config.vocab_size
    tokens = tokens.reshape(case["prompts"], length)

    def encode():
        with torch.no_grad():
            started = place.clock()
            network(tokens)
            return place.clock() - started

    return {"sdpa": encode}


def sample(case):
    """The replacement trick with joint guidance: one reference, one new picture, both branches in one batch."""
    load = dict(torch_dtype=place.dtype(), low_cpu_mem_usage=False)
    network = couple(UNet2DConditionModel.from_pretrained(TRAINED, subfolder="unet", **load).to(place.device), 2).eval()
    vae = AutoencoderKL.from_pretrained(TRAINED, subfolder="vae", **load).to(place.device).eval()
    text = CLIPTextModel.from_pretrained(TRAINED / "text_encoder", attn_implementation="sdpa", dtype=place.dtype())
    text = text.to(place.device).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(TRAINED / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(TRAINED, subfolder="scheduler")
    size, scale = vae.config.sample_size, vae.config.scaling_factor
    reference = torch.rand(1, 3, size, size, dtype=place.dtype()) * 2 - 1
    prompts = ["a photo of a robot", "a photo of a robot on the beach", ""]
    settings = dict(padding="max_length", max_length=text.config.max_position_embeddings, truncation=True)

    def paint(memory_format):
        with torch.no_grad():
            started = place.clock()
            tokens = tokenizer(prompts, return_tensors="pt", **settings).input_ids.to(place.device)
            own, target, null = text(tokens).last_hidden_state
            context = torch.stack([null, null, own, target])
            known = vae.encode(reference).latent_dist.mean * scale
            scheduler.set_timesteps(case["steps"])
            x = torch.randn_like(known)
            hidden = torch.cat([torch.ones_like(known[:, :1]), torch.zeros_like(known)], dim=1)
            given = torch.cat([torch.zeros_like(known[:, :1]), known], dim=1)
            channels = torch.cat([hidden, hidden, given, hidden])
            for t in scheduler.timesteps:
                noisy = torch.cat([scheduler.add_noise(known, torch.randn_like(known), t), x]).repeat(2, 1, 1, 1)
                joined = torch.cat([noisy, channels], dim=1).contiguous(memory_format=memory_format)
                output = network(joined, t, encoder_hidden_states=context, return_dict=False)[0]
                nothing, full = output[1:2], output[3:4]
                x = scheduler.step(nothing + 3 * (full - nothing), t, x).prev_sample
            picture = vae.decode(x / scale, return_dict=False)[0]
            ((picture.clamp(-1, 1) + 1) * 127.5).round().byte()
            return place.clock() - started

    return Formats(network, paint).variants()
