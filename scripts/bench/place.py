"""Where PyTorch's side computes: the CPU as the cases say, or a GPU in bf16."""

import time

import torch

device = "cpu"


def settle(name):
    """On a GPU whatever is made from now on is made there."""
    global device
    device = name
    if is_gpu():
        torch.set_default_device(name)
        torch.backends.cudnn.benchmark = True


def is_gpu():
    return device != "cpu"


def dtype():
    """Of operations' inputs, and of networks that only predict."""
    return torch.bfloat16 if is_gpu() else torch.float32


def clock():
    """The time once all that was launched is done."""
    if is_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()
