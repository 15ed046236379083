"""Queries like those of real requests, by which the networks of a bundle are tried before the first request."""

import torch

from diffusion.data.pictures.buckets import Size
from diffusion.degradation import image_channels
from diffusion.random import Stream, normal, uniform
from diffusion.sampler import Query
from diffusion.spacing import sampling_sigmas
from diffusion.store.bundle_spec import BundleSpec


def trial_query(spec: BundleSpec, rows: int, trial: int, device: torch.device, size: Size | None = None) -> Query:
    """Rows like those of real requests: noise levels over the whole range, every label and the null label, where the model
    restores something to restore and nothing, and where it reads prompts those from none to the longest.  size: None for
    that of requests that do not say."""
    index = torch.arange(rows)
    levels = sampling_sigmas(spec.sampling, spec.sampling.steps).log()
    low, high = levels[-2].item(), levels[0].item()  # the last is 0
    sigma = (low + (high - low) * uniform(trial, Stream.SIGMA, index)).exp()
    shape = spec.shape_at(size)
    noise = normal(trial, Stream.INITIAL, index, shape)
    label = (index + trial) % (len(spec.classes) + 1)
    cond = {"label": label}
    if channels := image_channels(spec.degradations):
        shown = normal(trial, Stream.CHURN, index, (channels, *shape[1:]))
        cond["image"] = shown * (index % 3 > 0).view(-1, 1, 1, 1)  # among them pictures drawn freely
    if spec.text:
        length = torch.linspace(0, spec.text.tokens, rows).round()
        mask = torch.arange(spec.text.tokens) < length[:, None]
        # as an encoder writes them: zeros where there is no token
        text = normal(trial, Stream.INITIAL, rows + index, (spec.text.tokens, spec.text.width)) * mask[:, :, None]
        cond |= {"text": text, "text_mask": mask}
    on_device = {name: value.to(device) for name, value in cond.items()}
    return Query((noise * sigma.view(-1, 1, 1, 1)).to(device), sigma.to(device), on_device)
