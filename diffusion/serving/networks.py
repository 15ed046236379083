"""The networks of a bundle, each asked in batch sizes that are proven for it: the model's, and its guide's if it has one.

Pictures of another size make other calls, so each size has ladders of its own.
"""

import threading

import torch
from torch import Tensor

from diffusion.data.pictures.buckets import Size
from diffusion.guidance import by_model
from diffusion.sampler import Denoise, Query
from diffusion.serving.ladder import Ladder, prove
from diffusion.serving.trial import trial_query
from diffusion.store.bundle import Bundle


class Networks:
    """largest: rows of the largest call.  The bundle's own size of picture is proven now, another when it is first asked."""

    def __init__(self, bundle: Bundle, device: torch.device, largest: int) -> None:
        self.bundle, self.device, self.largest = bundle, device, largest
        self._proving = threading.Lock()
        self._ladders: dict[tuple[Denoise, Size], Ladder] = {}
        for network in (bundle.denoiser, bundle.guide):
            if network is not None:
                self.ladder_of(network, bundle.spec.size)

    def ladder_of(self, network: Denoise, size: Size) -> Ladder:
        """Proven now, where it was not."""
        if found := self._ladders.get((network, size)):
            return found
        with self._proving:
            if (network, size) not in self._ladders:
                self._ladders[network, size] = prove(
                    network,
                    lambda rows, trial: trial_query(self.bundle.spec, rows, trial, self.device, size),
                    largest=self.largest,
                )
            return self._ladders[network, size]

    def seconds(self, rows: int) -> float:
        """What a tick that asks so many rows takes of the networks, as measured, where all are of the bundle's own size."""
        ladder = self.ladder_of(self.bundle.denoiser, self.bundle.spec.size)
        return ladder.cost(ladder.plan(rows))

    def denoise(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        """D(x; sigma) of every row, with the bits it would have alone; by the guide where its column `model` is 1."""
        size = tuple(x.shape[2:])

        def asking(network: Denoise) -> Denoise:
            return lambda x, sigma, **cond: self.ladder_of(network, size).answer(network, Query(x, sigma, cond))

        model = asking(self.bundle.denoiser)
        if self.bundle.guide is None:
            return model(x, sigma, **cond)
        return by_model(model, asking(self.bundle.guide))(x, sigma, **cond)
