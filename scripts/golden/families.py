"""Stable Diffusion XL, InstructPix2Pix, a network that predicts v and one for inpainting: their networks, and whole runs of
their pipelines."""

import json
import shutil

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from . import diffusion, networks, samplers, vocabulary
from .files import digest, generator, gradients_by_name, normal, save
from .networks import TOKENS, WIDTH, randomised
from .unet import OUTPUT_TOLERANCE, couple, inputs_for

WIDTH_2, POOLED, SIZE_WIDTH = 24, 12, 4  # of the second text encoder, of what it pools, of a size's sinusoids
GRADIENT_TOLERANCE = 5e-4  # set beforehand; 1.4e-4 was seen
TEXT_TOLERANCE, TEXT_GRADIENT_TOLERANCE, RUN_TOLERANCE = 1.5e-6, 6e-6, 1e-5
SIDE, STEPS, SCALE = 16, 5, 3.0
EDIT_SCALE, IMAGE_SCALE = 7.5, 1.5  # of the text and of the picture

# What stands in stabilityai/stable-diffusion-xl-base-1.0's scheduler/.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def xl_unet(seed=21):
    """A first level without attention, transformers that grow deeper, heads by level, pooled text and six sizes."""
    return networks.unet(
        seed=seed,
        in_channels=4,
        block_out_channels=[4, 8, 8],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=[1, 2, 4],
        transformer_layers_per_block=[1, 2, 3],
        cross_attention_dim=WIDTH + WIDTH_2,
        norm_num_groups=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * SIZE_WIDTH,
    )


def text_encoder_2(seed=23, eos_token_id=2):
    """Its config says 2 for the token that ends a text, as the public one does: it pools at the highest token."""
    config = CLIPTextConfig(
        vocab_size=vocabulary.size(),
        hidden_size=WIDTH_2,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        projection_dim=POOLED,
        bos_token_id=vocabulary.size() - 2,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return randomised(CLIPTextModelWithProjection(config), seed)


def xl_networks():
    return dict(
        unet=xl_unet(),
        vae=networks.vae(seed=22, block_out_channels=[4, 8], norm_num_groups=2, scaling_factor=0.13025),
        text_encoder=networks.text_encoder(seed=24),
        text_encoder_2=text_encoder_2(),
    )


def write_pipeline(folder):
    """What `save_pretrained` of a Stable Diffusion XL pipeline writes."""
    shutil.rmtree(folder, ignore_errors=True)
    plain = folder.parent / "tiny-pipeline" / "tokenizer"
    parts = dict(
        **xl_networks(),
        tokenizer=CLIPTokenizer.from_pretrained(plain),
        tokenizer_2=CLIPTokenizer.from_pretrained(plain, pad_token="!"),
    )
    pipeline = StableDiffusionXLPipeline(**parts, scheduler=DDIMScheduler.from_config(SCHEDULER))
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    # diffusers keeps a list in random order among the fields.
    for config in (folder / "unet" / "config.json", folder / "vae" / "config.json"):
        fields = {key: value for key, value in json.loads(config.read_text()).items() if not key.startswith("_use_d")}
        config.write_text(json.dumps(fields, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder.name}: {size / 1000:.0f} kB")
    return pipeline


def xl_inputs(random, sets, images, size=(4, 8)):
    total = sets * images
    inputs = inputs_for(random, sets, images, size)
    del inputs["mask"], inputs["reference"]
    inputs["context"] = normal(random, total, 5, WIDTH + WIDTH_2)
    inputs["text_embeds"] = normal(random, total, POOLED)
    inputs["time_ids"] = torch.randint(0, 1025, (total, 6), generator=random).double()
    return inputs


def added(inputs):
    return {name: inputs[name] for name in ("text_embeds", "time_ids")}


def xl_eps(network, inputs, images):
    timesteps = inputs["timesteps"].repeat_interleave(images)
    context, conditions = inputs["context"], added(inputs)
    predict = couple(network, images)
    return predict(inputs["noisy"], timesteps, encoder_hidden_states=context, added_cond_kwargs=conditions).sample


def edit_eps(network, inputs, images):
    """InstructPix2Pix: the picture to edit goes in as it is behind the noisy latents."""
    timesteps = inputs["timesteps"].repeat_interleave(images)
    joined = torch.cat([inputs["noisy"], inputs["reference"]], dim=1)
    return couple(network, images)(joined, timesteps, encoder_hidden_states=inputs["context"]).sample


def edit_unet():
    """One level, eight channels."""
    one_level = dict(block_out_channels=[6], attention_head_dim=2, norm_num_groups=2)
    cross = dict(down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"])
    return networks.unet(seed=25, in_channels=8, **one_level, **cross)


def write_cases(path, network, cases, predict, seed, **facts):
    """eps, loss and a digest of the gradients, for each set size."""
    stored = {}
    for images, inputs in cases.items():
        eps = predict(network, inputs, images)
        loss = ((eps - inputs["noise"]) ** 2).mean()
        tensors = {**inputs, "eps": eps, "loss": loss[None], "gradients": digest(gradients_by_name(network, loss))}
        stored.update({f"n{images}.{name}": tensor for name, tensor in tensors.items()})
    save(path, stored, seed, tolerance=OUTPUT_TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE, **facts)


def write_unets(folder):
    cases = {images: xl_inputs(generator(600 + images), 2, images) for images in (1, 2, 3)}
    write_cases(folder / "unet-xl-cases.safetensors", xl_unet().double(), cases, xl_eps, 600)
    network = edit_unet()
    config = {name: value for name, value in network.config.items() if not name.startswith("_use_default")}
    save(folder / "unet-edit.safetensors", network.state_dict(), 610, config=config)
    cases = {images: inputs_for(generator(610 + images), 2, images, (6, 4)) for images in (1, 2)}
    for inputs in cases.values():
        inputs["reference"] = normal(generator(615), *inputs["noisy"].shape)
        del inputs["mask"]
    write_cases(folder / "unet-edit-cases.safetensors", network.double(), cases, edit_eps, 610)


def in_double(run, *arguments, **named):
    """transformers builds the causal mask in the default type, which must hold the lowest float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return run(*arguments, **named)
    finally:
        torch.set_default_dtype(torch.float32)


def write_texts(folder):
    """The layer before the last and the pooled text, by both rules for where a text ends."""
    random = generator(620)
    end = vocabulary.size() - 1
    tokens = torch.randint(1, vocabulary.size() - 2, (3, TOKENS), generator=random)
    tokens[:, 0] = vocabulary.size() - 2
    # Padded with 0, padded with the end token, and full to the last place.
    tokens[0, 9], tokens[0, 10:] = end, 0
    tokens[1, 30:] = end
    tokens[2, -1] = end
    stored = {"tokens": tokens, "direction": normal(random, 3, TOKENS, WIDTH_2), "pooled_direction": normal(random, 3, POOLED)}
    first = networks.text_encoder(seed=24).double()
    stored["first"] = in_double(first, tokens, output_hidden_states=True).hidden_states[-2]
    # 7 stands in the first two texts' middle: an end token that is not the highest.
    stored["tokens_7"] = tokens.clone()
    stored["tokens_7"][:2, 5] = 7
    for eos, name in ((2, "tokens"), (end, "tokens"), (7, "tokens_7")):
        network = text_encoder_2(eos_token_id=eos).double()
        output = in_double(network, stored[name], output_hidden_states=True)
        context, pooled = output.hidden_states[-2], output.text_embeds
        loss = (context * stored["direction"]).mean() + (pooled * stored["pooled_direction"]).mean()
        case = {2: "highest", end: "end", 7: "seven"}[eos]
        stored[f"{case}.context"], stored[f"{case}.pooled"] = context, pooled
        stored[f"{case}.gradients"] = digest(gradients_by_name(network, loss))
    facts = dict(tolerance=TEXT_TOLERANCE, gradient_tolerance=TEXT_GRADIENT_TOLERANCE, end=end)
    save(folder / "text-xl.safetensors", stored, 620, **facts)


@torch.no_grad()
def with_reference(pipeline, case):
    """The replacement trick (JeDi, section 3.3) with a U-Net that takes no references: training-free."""
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(STEPS)
    known = pipeline.vae.encode(case["picture"] / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    x = case["target"][:1]
    texts, _, pooled, _ = in_double(pipeline.encode_prompt, case["prompts"], do_classifier_free_guidance=False)
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2).double()
    for index, t in enumerate(scheduler.timesteps):
        noisy = torch.cat([scheduler.add_noise(known, case["reference"][index], t), x])

        def eps(share):
            inputs = dict(noisy=noisy, timesteps=t[None], context=share * texts, text_embeds=share * pooled, time_ids=sizes)
            return xl_eps(pipeline.unet, inputs, 2)[1:]

        null, full = eps(0.0), eps(1.0)
        x = scheduler.step(null + SCALE * (full - null), t, x).prev_sample
    return x


def write_runs(folder, pipeline):
    random = generator(630)
    pipeline.to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    case = {
        "target": normal(random, 2, 4, SIDE // 2, SIDE // 2),
        "reference": normal(random, STEPS, 1, 4, SIDE // 2, SIDE // 2),
        "picture": torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=random).double(),
    }
    prompts = ["the same toy on the beach, at night", "two dogs in the snow"]
    settings = dict(height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent")
    pipeline.scheduler = DDIMScheduler.from_config(SCHEDULER)
    stored = dict(case)
    for name, negative in (("plain", None), ("negative", "blurred, red")):
        negatives = negative and [negative] * len(prompts)
        latents = case["target"].clone()
        run = in_double(pipeline, prompts, negative_prompt=negatives, latents=latents, **settings)
        stored[name] = run.images
    stored["training-free"] = with_reference(pipeline, {**case, "prompts": ["a photo of the red toy", prompts[0]]})
    facts = dict(prompts=prompts, caption="a photo of the red toy", negative="blurred, red", steps=STEPS, size=SIDE)
    save(folder / "sampling-xl.safetensors", stored, 630, scale=SCALE, tolerance=RUN_TOLERANCE, **facts)


def one_reference(random):
    """A reference with its caption, two pictures to be made with their prompts, and all noise."""
    return {
        "target": normal(random, 2, 4, 8, 8),
        "reference": normal(random, STEPS, 1, 4, 8, 8),
        "pictures": torch.randint(0, 256, (1, 3, 16, 16), generator=random).double(),
        "texts": ["a photo of the red toy", "the same toy on the beach, at night", "two dogs in the snow"],
        "ancestral": normal(random, STEPS, 2, 4, 8, 8),
    }


def write_velocity(folder):
    """tiny-pipeline/ with a scheduler that says `v_prediction`, as Stable Diffusion 2 does: references and two targets."""
    random = generator(640)
    models = diffusion.Models(folder)
    case = one_reference(random)
    stored = {name: tensor for name, tensor in case.items() if name not in ("texts", "ancestral")}
    usual = samplers.scheduler
    samplers.scheduler = lambda name: usual(name, prediction_type="v_prediction")
    try:
        for sampler in ("ddim", "dpm++", "euler"):
            stored[sampler] = diffusion.sample(models, case, dict(scale=SCALE), sampler=sampler)
    finally:
        samplers.scheduler = usual
    facts = dict(texts=case["texts"], steps=STEPS, scale=SCALE, tolerance=RUN_TOLERANCE)
    save(folder / "sampling-v.safetensors", stored, 640, **facts)


@torch.no_grad()
def write_inpainting(folder):
    """tiny-pipeline/ as a network for inpainting: all masked by diffusers' own pipeline, and beside a reference."""
    random = generator(650)
    models = diffusion.Models(folder)
    case = one_reference(random)
    # A picture of which all is masked out is 0 in [-1, 1]. Encoded beforehand: the pipeline would draw from the latents'
    # distribution, jedi takes its middle.
    blank = models.latents(torch.full((1, 3, 16, 16), 127.5).double())
    pipeline = StableDiffusionInpaintPipeline(
        vae=models.vae,
        text_encoder=models.text,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tiny-pipeline" / "tokenizer"),
        unet=models.unet,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    masked = dict(image=torch.zeros(2, 3, 16, 16).double(), mask_image=torch.ones(2, 1, 16, 16).double())
    settings = dict(height=16, width=16, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent")
    run = in_double(
        pipeline, case["texts"][1:], latents=case["target"].clone(), masked_image_latents=blank, **masked, **settings
    )
    stored = {name: case[name] for name in ("target", "reference", "pictures")}
    stored["plain"] = run.images
    # Around known parts: masks of every level, 255 where nothing is known, 127 and 128 among them.
    own = generator(651)
    kept = torch.randint(0, 256, (2, 3, 16, 16), generator=own).double()
    levels = torch.randint(0, 256, (2, 1, 16, 16), generator=own).double()
    levels[:, :, ::2, ::2] = torch.tensor([0.0, 127.0, 128.0, 255.0]).double().repeat(2, 1, 8, 2)
    stored["kept"], stored["levels"] = kept, levels
    pipeline._encode_vae_image = lambda image, generator: models.latents((image + 1) * 127.5)
    pictures = dict(image=kept / 255, mask_image=levels / 255)
    run = in_double(pipeline, case["texts"][1:], latents=case["target"].clone(), **pictures, **settings)
    stored["masked"] = run.images
    stored["training-free"] = in_double(diffusion.sample, models, case, dict(scale=SCALE), blank=blank)
    facts = dict(texts=case["texts"], steps=STEPS, scale=SCALE, tolerance=RUN_TOLERANCE)
    save(folder / "sampling-inpainting.safetensors", stored, 650, **facts)


@torch.no_grad()
def write_edits(folder):
    """The U-Net of unet-edit.safetensors with the other networks of tiny-pipeline/: InstructPix2Pix with its two scales."""
    random = generator(660)
    models = diffusion.Models(folder)
    case = {
        "target": normal(random, 2, 4, 8, 8),
        "pictures": torch.randint(0, 256, (2, 3, 16, 16), generator=random).double(),
    }
    texts = ["turn it into a watercolour", "make it night"]
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=models.vae,
        text_encoder=models.text,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tiny-pipeline" / "tokenizer"),
        unet=edit_unet().double(),
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    scales = dict(guidance_scale=EDIT_SCALE, image_guidance_scale=IMAGE_SCALE)
    stored = dict(case)
    for name, scheduler in (("ddim", networks.scheduler()), ("euler", samplers.scheduler("euler"))):
        pipeline.scheduler = scheduler
        run = in_double(
            pipeline,
            texts,
            image=case["pictures"] / 255,
            latents=case["target"].clone(),
            num_inference_steps=STEPS,
            output_type="latent",
            **scales,
        )
        stored[name] = run.images
    facts = dict(texts=texts, steps=STEPS, text_scale=EDIT_SCALE, image_scale=IMAGE_SCALE, tolerance=RUN_TOLERANCE)
    save(folder / "sampling-edit.safetensors", stored, 660, **facts)


def write(folder):
    write_unets(folder)
    write_texts(folder)
    write_velocity(folder)
    write_inpainting(folder)
    write_edits(folder)
    write_runs(folder, write_pipeline(folder / "tiny-xl"))
