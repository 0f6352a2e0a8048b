"""Ten training steps, and whole guided sampling runs, of the U-Net in tiny-pipeline/."""

import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from transformers import CLIPTokenizerFast

from . import networks, samplers
from .files import generator, normal, save
from .text import context_of
from .unet import inputs_for, predict

# Three times what was seen, of the largest magnitude.
LOSS_TOLERANCE, NORM_TOLERANCE = 1.5e-5, 5e-5
LATENT_TOLERANCE, SCHEDULE_TOLERANCE = 4e-6, 2e-6
OPTIMISER = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0)
REFERENCES, STEPS, SIZE = 2, 5, (6, 4)


def write_training(folder):
    """PyTorch's AdamW with the gradient clipped to norm 1; batches of one or two sets of 1 to 4 images in turn."""
    network = networks.unet().double()
    optimiser = torch.optim.AdamW(
        network.parameters(),
        lr=OPTIMISER["learning_rate"],
        betas=(OPTIMISER["beta1"], OPTIMISER["beta2"]),
        eps=OPTIMISER["eps"],
        weight_decay=OPTIMISER["weight_decay"],
    )
    stored, losses, norms = {}, [], []
    for step in range(10):
        images = 1 + step % 4
        inputs = inputs_for(generator(500 + step), 1 + step % 2, images, SIZE)
        # The noise is a function of the noisy latents, so that there is something to learn.
        inputs["noise"] = (0.8 * inputs["noisy"] + 0.2 * inputs["noise"]).float().double()
        loss = ((predict(network, inputs, images) - inputs["noise"]) ** 2).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMISER["clip_norm"]))
        optimiser.step()
        losses.append(loss.detach())
        stored.update({f"step{step}.{key}": value for key, value in inputs.items()})
    stored["losses"], stored["gradient_norms"] = torch.stack(losses), torch.stack(norms)
    save(
        folder / "training.safetensors",
        stored,
        500,
        optimiser=OPTIMISER,
        tolerance=LOSS_TOLERANCE,
        norm_tolerance=NORM_TOLERANCE,
    )


def norms(direction):
    return direction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def guided(eps, guidance, scales, normalised=False, rescale=0.0):
    """design.md, section 1. `eps(text, image)` predicts with the text or the references kept or nulled."""
    full = eps(True, True)
    if guidance == "text-only":
        without_text = eps(False, True)
        prediction = without_text + scales["scale"] * (full - without_text)
    elif guidance == "joint":
        null = eps(False, False)
        prediction = null + scales["scale"] * (full - null)
    else:
        null = eps(False, False)
        if guidance == "text-first":
            middle, first, second = eps(True, False), scales["text_scale"], scales["image_scale"]
        else:
            middle, first, second = eps(False, True), scales["image_scale"], scales["text_scale"]
        one, two = middle - null, full - middle
        if normalised:
            smaller = torch.minimum(norms(one), norms(two))
            one, two = one * smaller / norms(one), two * smaller / norms(two)
        prediction = null + first * one + second * two
    return rescale_noise_cfg(prediction, full, rescale) if rescale else prediction


class Models:
    """The networks of tiny-pipeline/ in float64, and its tokenizer."""

    def __init__(self, folder):
        self.unet, self.vae, self.text = (
            networks.unet().double(),
            networks.vae().double(),
            networks.text_encoder().double(),
        )
        self.tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tiny-pipeline" / "tokenizer")

    def context(self, texts):
        settings = dict(padding="max_length", max_length=networks.TOKENS, truncation=True, return_tensors="pt")
        return context_of(self.text, self.tokenizer(texts, **settings).input_ids)

    def latents(self, pictures):
        """The mean, scaled; pictures are levels 0 to 255."""
        return self.vae.encode(pictures / 127.5 - 1).latent_dist.mean * self.vae.config.scaling_factor

    def pictures(self, latents):
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round()


@torch.no_grad()
def sample(models, case, scales, guidance="joint", sampler="ddim", negative="", blank=None, **restraint):
    """The replacement trick (JeDi, section 3.3): references, then targets. `blank` stands in place of the reference of a
    picture that is not given: zeros if there is none."""
    scheduler = samplers.scheduler(sampler)
    scheduler.set_timesteps(STEPS)
    x = case["target"] * scheduler.init_noise_sigma
    known = models.latents(case["pictures"]) if "pictures" in case else x[:0]
    references, targets, size = len(known), len(x), x.shape[2:]
    images = references + targets
    mask = torch.tensor([0.0] * references + [1.0] * targets).double().reshape(images, 1, 1, 1).expand(images, 1, *size)
    blank = torch.zeros_like(x[:1]) if blank is None else blank
    reference = torch.cat([known, blank.expand(targets, *blank.shape[1:])])
    context = models.context(case["texts"])
    null_context = models.context([""] * references + [negative] * targets)
    samplers.add_given_noise(case["ancestral"])
    for index, t in enumerate(scheduler.timesteps):
        noised = known
        if references and sampler == "ddim":
            noised = scheduler.add_noise(known, case["reference"][index], t)
        elif references:
            # The noise level that the network is told, whatever x is to the sampler.
            sigma = scheduler.sigmas[index].double()
            noised = (known + sigma * case["reference"][index]) / (sigma**2 + 1) ** 0.5
        noisy = torch.cat([noised, scheduler.scale_model_input(x, t).double()])

        def eps(text, image):
            branch = {
                "noisy": noisy,
                "mask": mask if image else torch.ones_like(mask),
                "reference": reference if image else blank.expand(images, *blank.shape[1:]),
                "timesteps": t[None],
                "context": context if text else null_context,
            }
            return predict(models.unet, branch, images)[references:]

        x = scheduler.step(guided(eps, guidance, scales, **restraint), t, x).prev_sample
    return x.double()


def write_sampling(folder):
    """Pictures and prompts in, latents and pictures out: everything that `jedi sample` does."""
    random = generator(520)
    models = Models(folder)
    pictures = torch.randint(0, 256, (REFERENCES, 3, 16, 16), generator=random).double()
    texts = ["a photo of the red toy", "", "the same toy on the beach, at night", "two dogs in the snow"]
    target, reference = normal(random, 2, 4, 8, 8), normal(random, STEPS, REFERENCES, 4, 8, 8)
    ancestral = normal(generator(521), STEPS, 2, 4, 8, 8)
    scales = dict(scale=3.0, text_scale=2.5, image_scale=1.5)
    one = {
        "pictures": pictures,
        "texts": texts[:3],
        "target": target[:1],
        "reference": reference,
        "ancestral": ancestral[:, :1],
    }
    two = {**one, "texts": texts, "target": target, "ancestral": ancestral}
    negative = "two dogs, blurred"
    runs = {guidance: (one, dict(guidance=guidance)) for guidance in ("joint", "text-first", "image-first", "text-only")}
    runs["two-targets"] = (two, {})
    runs["no-references"] = ({"texts": texts[2:], "target": target, "ancestral": ancestral}, {})
    runs.update({f"sampler {name}": (two, dict(sampler=name)) for name in samplers.KINDS})
    runs["negative"] = (two, dict(negative=negative))
    runs["normalised"] = (two, dict(guidance="text-first", normalised=True))
    runs["rescaled"] = (two, dict(rescale=0.7))
    stored = {"pictures": pictures, "target": target, "reference": reference, "ancestral": ancestral}
    for name, (case, options) in runs.items():
        stored[f"{name}.latents"] = sample(models, case, scales, **options)
        with torch.no_grad():
            stored[f"{name}.pictures"] = models.pictures(stored[f"{name}.latents"])
    save(
        folder / "sampling.safetensors",
        stored,
        520,
        texts=texts,
        negative=negative,
        scales=scales,
        steps=STEPS,
        tolerance=LATENT_TOLERANCE,
    )


def write_schedule(folder):
    """DDIMScheduler alone: ᾱ, timesteps of every spacing, and single steps for both kinds of prediction."""
    random = generator(540)
    stored, timesteps = {}, {}
    for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = DDIMScheduler.from_config(networks.scheduler().config, beta_schedule=beta_schedule)
        stored[f"alphas_cumprod.{beta_schedule}"] = scheduler.alphas_cumprod
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDIMScheduler.from_config(networks.scheduler().config, timestep_spacing=spacing)
        timesteps[spacing] = {}
        for steps in (1, 2, 3, 4, 5, 7, 10, 16, 20, 25, 30, 50, 80, 100, 250):
            scheduler.set_timesteps(steps)
            timesteps[spacing][steps] = scheduler.timesteps.tolist()
    stored["x"], stored["output"] = normal(random, 12), normal(random, 12)
    for prediction in ("epsilon", "v_prediction"):
        for to_one in (False, True):
            changes = dict(prediction_type=prediction, set_alpha_to_one=to_one)
            scheduler = DDIMScheduler.from_config(networks.scheduler().config, **changes)
            scheduler.set_timesteps(7)  # does not divide 1000
            steps = [scheduler.step(stored["output"], t, stored["x"]).prev_sample for t in scheduler.timesteps]
            stored[f"steps.{prediction}.{str(to_one).lower()}"] = torch.stack(steps)
    save(folder / "schedule.safetensors", stored, 540, timesteps=timesteps, tolerance=SCHEDULE_TOLERANCE)


def write(folder):
    write_schedule(folder)
    write_training(folder)
    write_sampling(folder)
