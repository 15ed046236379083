import pytest
import torch

from diffusion.denoiser import Precond, denoiser_of
from diffusion.recipe import UNetRecipe

SIGMA = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
UNET = UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=())


def test_preconditioning_keeps_input_and_target_at_unit_variance():
    p = Precond(sigma_data=0.7)
    torch.testing.assert_close(p.c_in(SIGMA) ** 2 * (0.7**2 + SIGMA**2), torch.ones_like(SIGMA))
    # Var[x0 - c_skip x] / c_out^2 = 1, the effective target of F  [EDM, Eq. 8 and B.6]
    residual = (1 - p.c_skip(SIGMA)) ** 2 * 0.7**2 + p.c_skip(SIGMA) ** 2 * SIGMA**2
    torch.testing.assert_close(residual / p.c_out(SIGMA) ** 2, torch.ones_like(SIGMA))


def test_weight_is_the_published_formula():
    p = Precond(sigma_data=0.5)
    torch.testing.assert_close(p.weight(SIGMA), (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2)


def test_a_network_that_answers_zero_gives_the_linear_denoiser():
    denoise = denoiser_of(UNET, resolution=16, classes=3, sigma_data=0.5, precision="fp32")
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 4.0])
    expected = x * (0.25 / (0.25 + sigma**2)).view(2, 1, 1, 1)
    torch.testing.assert_close(denoise(x, sigma, label=torch.tensor([0, 3])), expected)


def test_no_label_is_the_null_label():
    denoise = denoiser_of(UNET, resolution=16, classes=3, sigma_data=0.5, precision="fp32").eval()
    for parameter in denoise.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, sigma = torch.randn(1, 3, 16, 16), torch.tensor([1.0])
    with torch.no_grad():
        assert torch.equal(denoise(x, sigma), denoise(x, sigma, label=torch.tensor([3])))
        assert not torch.equal(denoise(x, sigma), denoise(x, sigma, label=torch.tensor([0])))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_answers_are_float32_and_close_in_both_precisions(precision):
    denoise = denoiser_of(UNET, resolution=16, classes=3, sigma_data=0.5, precision=precision).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in denoise.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        out = denoise(x, torch.tensor([0.3, 2.0]))
        denoise.precision = "fp32"
        reference = denoise(x, torch.tensor([0.3, 2.0]))
    assert out.dtype == torch.float32
    assert (out - reference).norm() < 0.02 * reference.norm()
