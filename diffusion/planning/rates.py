"""How fast things go: as a probe measured them, or by formula where nothing was measured.

What no probe measures - how long Ray, Prefect and MLflow take to start - is told in units of what it does measure: the time
in which processes that load torch get ready, all workers at once.
"""

from typing import Literal

from pydantic import Field

from diffusion.planning.devices import Device
from diffusion.recipe import Frozen, Recipe

START_S = 4.0  # of two processes that load torch, on two idle cores
_FILE_S, _FILE_BYTE_S, _PIXEL_S = 0.4e-3, 25e-9, 40e-9  # decoding, resizing, encoding: processor seconds
_READ_S, _READ_PIXEL_S = 25e-6, 15e-9  # of a picture of a shard: README, "decoding 32 px PNGs", and 64 px
_FEATURE_FLOPS = {  # of a picture at the extractor's own side, and that side
    "efficientnet-lite0": (0.8e9, 224),
    "inception-v3": (11.4e9, 299),
    "inception-v3-tf": (11.4e9, 299),
    "dinov2": (46e9, 224),
    "clip": (8.8e9, 224),
}
_CORE_FLOP_S = 60e9  # float32, of a core of a server
_DISK_BYTES_S, _NETWORK_BYTES_S = 500e6, 1.25e9


class Rates(Frozen):
    """Seconds of one thing on one worker while all workers are busy."""

    start_s: float = Field(START_S, gt=0, description="Until processes that load torch are ready, all at once")
    decode_s: float = Field(ge=0, description="Processor seconds of a file: decode, resize, encode")
    read_s: float = Field(ge=0, description="Processor seconds of a picture of a shard, decoded for a batch")
    step_s: tuple[float, ...] = Field(
        min_length=1, description="Of a training step on all workers, as often as measured"
    )
    answer_s: float = Field(gt=0, description="Of a row that the network answers, without gradients")
    feature_s: float = Field(ge=0, description="Of a picture in the extractor")
    core: float = Field(1.0, gt=0, le=1.5, description="Share of a processor that a busy thread gets")
    disk_bytes_s: float = Field(_DISK_BYTES_S, gt=0)
    network_bytes_s: float = Field(_NETWORK_BYTES_S, gt=0, description="To a bucket, of each machine")
    how: Literal["measured", "by formula"]

    @property
    def spread(self) -> tuple[float, float]:
        """Factors of what may come instead, of work; starting varies more."""
        return (0.85, 1.25) if self.how == "measured" else (0.5, 2.0)


def assumed(
    recipe: Recipe,
    *,
    step_flops: float,
    row_flops: float,
    flop_per_s: float,
    file_bytes: float,
    on_cpu: bool,
    exchange_s: float = 0.0,
    network_bytes_s: float = _NETWORK_BYTES_S,
) -> Rates:
    """Rates by formula.  step_flops: of a step on one worker.  flop_per_s: that a worker reaches.  exchange_s: of a step's
    gradients between the workers, half of which is hidden behind the backward pass."""
    flops, side = _FEATURE_FLOPS[recipe.evaluate.extractor]
    feature = flops * (recipe.evaluate.extractor_resolution / side) ** 2
    pixels = recipe.shard.resolution**2
    return Rates(
        decode_s=_FILE_S + _FILE_BYTE_S * file_bytes + _PIXEL_S * pixels,
        read_s=_READ_S + _READ_PIXEL_S * pixels,
        step_s=(step_flops / flop_per_s + exchange_s / 2,),
        answer_s=row_flops / flop_per_s,
        feature_s=feature / (_CORE_FLOP_S if on_cpu else flop_per_s / 4),  # float32, which it is measured in
        network_bytes_s=network_bytes_s,
        how="by formula",
    )


def reached(device: Device, mfu: float) -> float:
    """FLOP/s.  Raises ValueError."""
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu:g}: it is a share of what the device could do, above 0 and at most 1")
    return device.flop_per_s * mfu
