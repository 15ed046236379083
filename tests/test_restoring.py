"""What a restoration is told of a given picture and its mask, and how it asks with that."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.images import to_uint8
from diffusion.degradation import FACTORS, beside
from diffusion.operators import BlockMean
from diffusion.restore import residual
from diffusion.sampler import run
from diffusion.serving.engine import Engine
from diffusion.serving.given import Given, keep_of
from diffusion.serving.request import GenerateRequest, RequestError, resolve
from diffusion.serving.restoring import Measurement, RestoreRequest, by_training, check_restoration, measured
from tests.random_bundle import (
    CLASSES,
    RESOLUTION,
    random_bundle,
    restoring_bundle,
)


def test_the_trained_way_asks_with_the_measurement_beside_x_and_puts_it_into_each_answer() -> None:
    engine = Engine(restoring_bundle())
    asked = GenerateRequest(label=CLASSES[0], seed=1, n=2, steps=2, guidance=2.0)
    operator = BlockMean(4)
    picture = torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = operator.forward(picture)
    converse = by_training(resolve(asked, engine.bundle.spec), operator, y, engine.bundle, engine.device)
    cond = next(converse(range(2))).cond
    # two pictures, guided towards their class alone
    torch.testing.assert_close(cond["image"], beside(operator, picture).expand(4, -1, -1, -1))
    assert cond["label"].tolist() == [0, 0, len(CLASSES), len(CLASSES)]
    assert residual(operator, run(converse(range(2)), engine.denoise), y).max() < 5e-6  # float32; answers may be large


def given(image: Image.Image) -> Given:
    return Given(image, "0" * 64)


def measure(image: Image.Image, task: str, factor: int | None) -> Measurement:
    asked = RestoreRequest(task=task, factor=factor)
    check_restoration(asked, given(image), None, random_bundle().spec)
    return measured(asked, image, None, (RESOLUTION, RESOLUTION), torch.device("cpu"))


@pytest.mark.parametrize("factor", FACTORS)
def test_a_small_picture_is_the_measurement_itself(factor: int) -> None:
    small = RESOLUTION // factor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (small, small, 3), dtype=np.uint8))
    found = measure(image, "super-resolution", factor)
    assert np.array_equal(to_uint8(found.y)[0].numpy(), np.array(image))
    torch.testing.assert_close(found.operator.forward(found.before), found.y)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_small_grey_picture_is_the_measurement_of_both(factor: int) -> None:
    small = RESOLUTION // factor
    values = np.random.default_rng(0).integers(0, 256, (small, small), dtype=np.uint8)
    found = measure(Image.fromarray(values).convert("RGB"), "colorization", factor)
    operator, y, before = found.operator, found.y, found.before
    assert np.array_equal(to_uint8(y.expand(1, 3, small, small))[0, ..., 0].numpy(), values)
    assert torch.equal(before, before[:, :1].expand_as(before))
    torch.testing.assert_close(operator.forward(before), y)
    torch.testing.assert_close(operator.forward(operator.pinv(y)), y)


def test_too_small_a_picture_is_told_what_would_do() -> None:
    with pytest.raises(RequestError, match=r"4 x 4, the model draws 16 x 16: give factor 4 or 8"):
        measure(Image.new("RGB", (4, 4)), "super-resolution", 2)
    with pytest.raises(RequestError, match="at least 2 x 2"):
        measure(Image.new("RGB", (1, 9)), "super-resolution", 8)


def test_a_mask_that_keeps_nothing_is_refused() -> None:
    image = Image.new("RGB", (RESOLUTION, RESOLUTION))
    white = given(Image.new("RGB", image.size, "white"))
    with pytest.raises(RequestError, match="white everywhere"):
        check_restoration(RestoreRequest(task="inpainting"), given(image), white, random_bundle().spec)


def test_a_mask_without_white_is_refused_and_transparency_is_dark() -> None:
    side = RESOLUTION
    with pytest.raises(RequestError, match="dark everywhere"):
        keep_of(Image.new("RGB", (side, side)), (side, side))
    clear = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 4, 4))
    keep = keep_of(clear, (side, side))
    assert keep.shape == (3, side, side)
    assert (~keep).sum() == 3 * 4 * 4
