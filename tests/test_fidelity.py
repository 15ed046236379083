import math
from itertools import islice

import numpy as np
import pytest
import torch

from diffusion.data.images import decode_png
from diffusion.data.sources import open_source, read_item
from diffusion.evaluation.metrics.fidelity import psnr, ssim


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    source = open_source("embedded")
    places = [item.place for item in islice(source.items(), 0, 400, 100)]
    return torch.from_numpy(np.stack([decode_png(read_item(source.uri, place)) for place in places]))


def noisy(pictures: torch.Tensor, std: float) -> torch.Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)) * std
    return (pictures + noise).round().clamp(0, 255).to(torch.uint8)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One picture, window by window, as the paper writes it."""
    place = np.arange(11) - 5
    weights = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[:, :, None]
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (picture[y : y + 11, x : x + 11].astype(float) for picture in (a, b))
            p_mean, q_mean = (weights * p).sum((0, 1)), (weights * q).sum((0, 1))
            p_var, q_var = (weights * (p - p_mean) ** 2).sum((0, 1)), (weights * (q - q_mean) ** 2).sum((0, 1))
            both = (weights * (p - p_mean) * (q - q_mean)).sum((0, 1))
            c1, c2 = 2.55**2, 7.65**2
            top = (2 * p_mean * q_mean + c1) * (2 * both + c2)
            values.append(top / ((p_mean**2 + q_mean**2 + c1) * (p_var + q_var + c2)))
    return float(np.mean(values))


def test_ssim_equals_the_definition(pictures):
    other = noisy(pictures, 30)
    expected = [slow_ssim(a, b) for a, b in zip(other.numpy()[:2], pictures.numpy()[:2], strict=True)]
    assert ssim(other[:2], pictures[:2]).tolist() == pytest.approx(expected, abs=1e-10)


def test_psnr_of_a_known_error():
    truth = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    other = truth.clone()
    other[0] += 10
    other[1, :8] += 10
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 10) + 10 * math.log10(2)]
    assert psnr(other, truth).tolist() == pytest.approx(expected)


def test_the_truth_itself_is_perfect(pictures):
    assert psnr(pictures, pictures).isinf().all()
    assert ssim(pictures, pictures).tolist() == pytest.approx([1.0] * len(pictures))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_more_noise_is_worse_and_order_does_not_matter(measure, pictures):
    little, much = noisy(pictures, 5), noisy(pictures, 40)
    assert (measure(little, pictures) > measure(much, pictures)).all()
    torch.testing.assert_close(measure(little, pictures), measure(pictures, little))


def test_what_is_no_picture_is_refused(pictures):
    with pytest.raises(ValueError, match="uint8"):
        psnr(pictures.float(), pictures)
    with pytest.raises(ValueError, match="as many"):
        ssim(pictures[:1], pictures)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(pictures[:, :8, :8], pictures[:, :8, :8])
