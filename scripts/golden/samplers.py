"""Every sampler's whole trajectory on a fixed network output, by diffusers' schedulers."""

import diffusers
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral_module

from . import networks
from .files import generator, normal, save

STEPS = 7  # does not divide 1000
TOLERANCE = 1.3e-5  # three times what was seen: diffusers keeps its σ in float32
TOLERANCE_ZERO_SNR = 1e-4  # the first σ is 4096, which takes 12 of a float32's 24 bits

# By the names of `--sampler`; "karras" stands for --karras.
KINDS = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++ karras": (diffusers.DPMSolverMultistepScheduler, dict(use_karras_sigmas=True)),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler karras": (diffusers.EulerDiscreteScheduler, dict(use_karras_sigmas=True)),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "unipc karras": (diffusers.UniPCMultistepScheduler, dict(use_karras_sigmas=True)),
}


def scheduler(name, **changes):
    """What a user of diffusers has after `SomeScheduler.from_config(pipeline.scheduler.config)`."""
    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(networks.scheduler().config, **changes)
    kind, own = KINDS[name]
    return kind.from_config(networks.scheduler().config, **own, **changes)


def add_given_noise(noise):
    """Lets the ancestral steps take `noise`, one entry after the other, in place of random numbers."""
    given = iter(noise)
    ancestral_module.randn_tensor = lambda shape, **_: next(given)


def trajectory(name, stored, **changes):
    """What the network is given at each step, and the result."""
    steps = scheduler(name, **changes)
    steps.set_timesteps(STEPS)
    x = stored["noise"] * steps.init_noise_sigma
    add_given_noise(stored["ancestral"])
    inputs = []
    for index, t in enumerate(steps.timesteps):
        inputs.append(steps.scale_model_input(x, t).double())
        x = steps.step(stored["outputs"][index], t, x).prev_sample.double()
    return torch.stack([*inputs, x])


def write(folder):
    random = generator(560)
    shape = (2, 3, 2, 2)
    stored = {
        "noise": normal(random, *shape),
        "outputs": normal(random, STEPS, *shape),
        "ancestral": normal(random, STEPS, *shape),
    }
    timesteps = {}
    zero = dict(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    stored["ddim.trailing.zero_snr"] = trajectory("ddim", stored, **zero)
    for spacing in ("leading", "trailing", "linspace"):
        for name in KINDS:
            for prediction in ("epsilon", "v_prediction"):
                changes = dict(timestep_spacing=spacing, prediction_type=prediction)
                stored[f"{name}.{spacing}.{prediction}"] = trajectory(name, stored, **changes)
            if spacing != "leading":
                zero = dict(timestep_spacing=spacing, prediction_type="v_prediction", rescale_betas_zero_snr=True)
                stored[f"{name}.{spacing}.zero_snr"] = trajectory(name, stored, **zero)
            for steps in (1, 2, 5, 20, 30):
                made = scheduler(name, timestep_spacing=spacing)
                made.set_timesteps(steps)
                timesteps.setdefault(f"{name}.{spacing}", {})[steps] = made.timesteps.tolist()
    save(folder / "samplers.safetensors", stored, 560, timesteps=timesteps, tolerance=TOLERANCE, tolerance_zero_snr=TOLERANCE_ZERO_SNR)
