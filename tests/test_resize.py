"""The two resizes: Pillow's bicubic one, which clean-fid uses, and TensorFlow 1's, told pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.evaluation.extractors.resize import bicubic, tensorflow1

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(height)).float()


@pytest.mark.parametrize("shape", [(32, 32), (40, 24), (99, 130)])
def test_bicubic_is_pillows_of_each_channel_in_floats(shape):
    x = pictures(*shape)
    found = bicubic(x, 61)
    for picture, own in zip(x.numpy(), found.numpy(), strict=True):
        channels = [Image.fromarray(channel).resize((61, 61), Image.Resampling.BICUBIC) for channel in picture]
        assert np.abs(np.stack(channels).clip(0, 255) - own).max() < 1e-3  # of 255


@pytest.mark.parametrize("shape", [(5, 7), (32, 32), (40, 24)])
def test_tensorflow1_is_a_mean_of_four_pixels_at_uncentred_places(shape):
    x = pictures(*shape)[:1]
    found, (height, width) = tensorflow1(x, 13), shape
    for i in range(13):
        for j in range(13):
            y, z = i * height / 13, j * width / 13
            top, left = int(y), int(z)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dz = y - top, z - left
            upper = x[0, :, top, left] * (1 - dz) + x[0, :, top, right] * dz
            lower = x[0, :, below, left] * (1 - dz) + x[0, :, below, right] * dz
            torch.testing.assert_close(found[0, :, i, j], upper * (1 - dy) + lower * dy, atol=1e-3, rtol=0)


def test_bicubic_is_antialiased_and_stays_in_range():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 255  # every second column: an aliasing kernel would give black, white or a beat
    small = bicubic(stripes, 16)
    assert (small[..., 2:-2] - 127.5).abs().max() < 4
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 255
    assert bicubic(edge, 64).min() >= 0
    assert bicubic(edge, 64).max() <= 255
    assert bicubic(edge, 16) is edge


def test_tensorflow1_skips_pixels_and_keeps_the_first():
    x = pictures(64, 64)
    assert torch.equal(tensorflow1(x, 16), x[..., ::4, ::4])
    assert torch.equal(tensorflow1(x, 64), x)
