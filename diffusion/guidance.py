"""Conditions and guidance: conversations around a conversation.

Guidance draws the answer away from that of a worse denoiser: one that knows less (classifier-free), or one that is less
(autoguidance).  Both ask for two answers in one query of 2 B rows and differ only in what its columns say.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.sampler import Conversation, Denoise, Query

Cond = Mapping[str, Tensor]  # every value has one row per picture
# the column that says which of several denoisers answers a row: 0 the model itself, 1 its worse version
MODEL = "model"


def conditioned(conversation: Conversation, cond: Cond) -> Conversation:
    """Every query of the inner conversation, asked under `cond` besides what it asks itself."""
    query = next(conversation)
    while True:
        try:
            query = conversation.send((yield query._replace(cond={**query.cond, **cond})))
        except StopIteration as done:
            return done.value


def classifier_free(
    conversation: Conversation,
    cond: Cond,
    null: Cond,
    scale: float,
    interval: tuple[float, float] = (0.0, float("inf")),
    *,
    rescale: float = 0.0,
) -> Conversation:
    """D = D_null + scale (D_cond - D_null) where sigma lies in the closed interval, D_cond elsewhere.

    A guided answer is one query of 2 B rows, the conditional ones first.  [Ho & Salimans 2022, Eq. 6;
    Kynkaanniemi et al. 2024, Eq. 5]  `rescale`: see `Guidance`.
    """
    if cond.keys() != null.keys():
        raise ValueError(f"cond has {sorted(cond)} and null has {sorted(null)}: give both the same names")
    guidance = Guidance(scale, interval, rescale)
    return (yield from _guided(conversation, next(conversation), cond, null, guidance))


def autoguided(
    conversation: Conversation,
    cond: Cond,
    scale: float,
    interval: tuple[float, float] = (0.0, float("inf")),
    *,
    rescale: float = 0.0,
) -> Conversation:
    """D = D_worse + scale (D - D_worse), both under `cond`; D_worse is a smaller, less trained model.  [Karras et al. 2024]

    Which denoiser answers is a column of the condition, `model`, 0 or 1 in every row, and so neither a second kind of query
    nor a second query.  A driver that holds many conversations still gathers rows by concatenation, whoever they are
    addressed to, deals them out by the column, and calls each network once: a guided step costs one turn, not two, and rows
    of all requests fill both networks' batches.  A driver of one conversation wraps its denoisers in `by_model`.
    """
    query = next(conversation)
    own = torch.zeros(len(query.x), dtype=torch.int64, device=query.x.device)
    guidance = Guidance(scale, interval, rescale)
    return (yield from _guided(conversation, query, {**cond, MODEL: own}, {**cond, MODEL: own + 1}, guidance))


def by_model(*denoisers: Denoise) -> Denoise:
    """One denoiser of several: the rows whose column `model` is k are answered by the k-th, without that column."""

    def denoise(x: Tensor, sigma: Tensor, *, model: Tensor, **cond: Tensor) -> Tensor:
        if not 0 <= int(model.min()) <= int(model.max()) < len(denoisers):
            raise ValueError(f"rows ask models {sorted(set(model.tolist()))}, and there are {len(denoisers)}, from 0")
        answer = torch.empty_like(x)
        for k, one in enumerate(denoisers):
            rows = (model == k).nonzero().squeeze(1)
            if len(rows):
                answer[rows] = one(x[rows], sigma[rows], **{name: value[rows] for name, value in cond.items()})
        return answer

    return denoise


@dataclass(frozen=True)
class Guidance:
    """How a wanted and an unwanted answer become one."""

    scale: float  # 1 is none
    interval: tuple[float, float] = (0.0, float("inf"))  # of sigma, closed: where it acts
    rescale: float = 0.0  # share, 0 to 1, of the correction of the contrast

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: give a share from 0 (none) to 1 (contrast of the wanted answer)")
        if not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval={self.interval}: give the lowest sigma first, and none below 0")

    def acts_at(self, sigma: Tensor) -> bool:
        """sigma (B,), all equal.  It is read, which waits for its device, only where the interval leaves anything out."""
        if self.scale == 1 or self.interval == (0.0, float("inf")):
            return self.scale != 1
        return self.interval[0] <= float(sigma[0]) <= self.interval[1]

    def combine(self, wanted: Tensor, unwanted: Tensor) -> Tensor:
        """unwanted + scale (wanted - unwanted), and of that a share with the standard deviation of `wanted`.

        [Lin et al. 2024, Sec. 3.4], per picture.  The paper rescales the network's output, v; we rescale D, all that a
        conversation sees and what contrast is a property of.  At pure noise, where the paper starts, v = -x0: the same.
        """
        guided = unwanted + self.scale * (wanted - unwanted)
        if self.rescale == 0:
            return guided
        reached = _contrast(guided)
        # a picture of one value has no contrast to correct
        factor = torch.where(reached > 0, _contrast(wanted) / reached, 1.0)
        return guided * (self.rescale * factor + (1 - self.rescale))


def _contrast(x: Tensor) -> Tensor:
    """Standard deviation of each picture, (B, 1, ...)."""
    # one at a time: the order in which a reduction adds may depend on how many pictures are taken together
    return torch.stack([picture.std(correction=0) for picture in x]).view(-1, *(1,) * (x.dim() - 1))


def _guided(conversation: Conversation, query: Query, wanted: Cond, unwanted: Cond, guidance: Guidance) -> Conversation:
    """A conversation whose open query is `query`, each of its questions asked under both conditions where guidance acts."""
    while True:
        x, sigma, own = query
        if guidance.acts_at(sigma):
            both = {name: torch.cat([value, value]) for name, value in own.items()}
            both |= {name: torch.cat([wanted[name], unwanted[name]]) for name in wanted}
            answers = yield Query(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
            answer = guidance.combine(*answers.chunk(2))
        else:
            answer = yield Query(x, sigma, {**own, **wanted})
        try:
            query = conversation.send(answer)
        except StopIteration as done:
            return done.value
