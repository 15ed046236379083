"""The networks of a bundle, each asked in batch sizes that are proven for it: the model's, and its guide's if it has one.

Pictures of another size make other calls, so each size has ladders of its own.
"""

import logging
import threading
import time

import torch
from torch import Tensor

from diffusion.data.pictures.buckets import Size, shown
from diffusion.guidance import by_model
from diffusion.sampler import Denoise, Query
from diffusion.serving.ladder import Ladder, prove
from diffusion.serving.trial import trial_query
from diffusion.store.bundle import Bundle

_log = logging.getLogger(__name__)


class Networks:
    """largest: rows of the largest call.  The bundle's own size of picture is proven now, others by `prove_next`, or when
    first asked for."""

    def __init__(self, bundle: Bundle, device: torch.device, largest: int) -> None:
        self.bundle, self.device, self.largest = bundle, device, largest
        self._proving = threading.Lock()
        self._ladders: dict[tuple[Denoise, Size], Ladder] = {}
        networks = [network for network in (bundle.denoiser, bundle.guide) if network is not None]
        for network in networks:
            self.ladder_of(network, bundle.spec.size)
        self._unproven = [
            (network, size) for size in bundle.spec.sizes or () if size != bundle.spec.size for network in networks
        ]

    @property
    def all_proven(self) -> bool:
        """Whether `prove_next` has been through all sizes."""
        return not self._unproven

    def prove_next(self) -> bool:
        """Prove and warm up what was not yet: one network for one size.  Returns whether there was any.

        One that cannot be asked in that size fails those who ask for it, and nobody else.
        """
        if not self._unproven:
            return False
        network, size = self._unproven.pop(0)
        began = time.perf_counter()
        try:
            ladder = self.ladder_of(network, size)
        except Exception as error:  # whatever a network raises
            _log.warning("pictures of %s cannot be drawn: %s", shown(size), error)
        else:
            _log.info("proved %s in %.2f s: %s", shown(size), time.perf_counter() - began, ladder.told())
        return True

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
