"""Conditions and guidance: conversations around a conversation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.sampler import Conversation, Query


def conditioned(conversation: Conversation, cond: Mapping[str, Tensor]) -> Conversation:
    """Every query of the inner conversation, asked under `cond` (values have one row per picture)."""
    query = next(conversation)
    while True:
        try:
            query = conversation.send((yield Query(query.x, query.sigma, cond)))
        except StopIteration as done:
            return done.value


def classifier_free(
    conversation: Conversation,
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    scale: float,
    interval: tuple[float, float] = (0.0, float("inf")),
) -> Conversation:
    """D = D_null + scale (D_cond - D_null) where sigma lies in the closed interval, D_cond elsewhere.

    A guided answer is one query of 2 B rows, the conditional ones first.  [Ho & Salimans 2022, Eq. 6;
    Kynkaanniemi et al. 2024, Eq. 5]
    """
    both = {name: torch.cat([cond[name], null[name]]) for name in cond}
    query = next(conversation)
    while True:
        x, sigma, _ = query
        if scale != 1 and interval[0] <= float(sigma[0]) <= interval[1]:
            wanted, unwanted = (yield Query(torch.cat([x, x]), torch.cat([sigma, sigma]), both)).chunk(2)
            answer = unwanted + scale * (wanted - unwanted)
        else:
            answer = yield Query(x, sigma, cond)
        try:
            query = conversation.send(answer)
        except StopIteration as done:
            return done.value
