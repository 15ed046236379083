import math

import pytest
import torch

from diffusion.denoiser import EDM, X0, Epsilon, V, denoised_of, denoiser_of, precond_of, prediction_of
from diffusion.random import Stream, normal
from diffusion.recipe import UNetRecipe

SIGMA = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
UNET = UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=())


def test_preconditioning_keeps_input_and_target_at_unit_variance():
    p = EDM(sigma_data=0.7)
    torch.testing.assert_close(p.c_in(SIGMA) ** 2 * (0.7**2 + SIGMA**2), torch.ones_like(SIGMA))
    # Var[x0 - c_skip x] / c_out^2 = 1, the effective target of F  [EDM, Eq. 8 and B.6]
    residual = (1 - p.c_skip(SIGMA)) ** 2 * 0.7**2 + p.c_skip(SIGMA) ** 2 * SIGMA**2
    torch.testing.assert_close(residual / p.c_out(SIGMA) ** 2, torch.ones_like(SIGMA))


def operands(sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """x0, noise and with them x, and z, alpha and s of the variance-preserving chain; float64, one row per sigma."""
    index = torch.arange(len(sigma))
    x0 = normal(0, Stream.INITIAL, index, (3, 4, 4)).double()
    noise = normal(0, Stream.NOISE, index, (3, 4, 4)).double()
    column = sigma.view(-1, 1, 1, 1)
    alpha_bar = 1 / (1 + column**2)
    alpha, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return {"x0": x0, "noise": noise, "x": x0 + column * noise, "z": alpha * x0 + s * noise, "alpha": alpha, "s": s}


PREDICTIONS = {"epsilon": Epsilon(), "v": V(), "x0": X0(), "edm": EDM(0.5)}
LEVELS = torch.tensor([1e-3, 0.02, 0.5, 1.0, 7.0, 80.0, 1e3], dtype=torch.float64)


def test_each_prediction_is_its_definition_on_the_chain():
    """Given the x0 and noise behind x, what the network must predict is the noise, v = alpha n - s x0, and x0."""
    o = operands(LEVELS)
    expected = {"epsilon": o["noise"], "v": o["alpha"] * o["noise"] - o["s"] * o["x0"], "x0": o["x0"]}
    for name, value in expected.items():
        precond = PREDICTIONS[name]
        torch.testing.assert_close(prediction_of(o["x0"], o["x"], LEVELS, precond), value, rtol=0, atol=1e-12)
        torch.testing.assert_close(denoised_of(value, o["x"], LEVELS, precond), o["x0"], rtol=0, atol=1e-12)
        # the textbook's network sees z
        torch.testing.assert_close(precond.c_in(LEVELS.view(-1, 1, 1, 1)) * o["x"], o["z"])


@pytest.mark.parametrize("to", PREDICTIONS)
@pytest.mark.parametrize("of", PREDICTIONS)
def test_any_prediction_becomes_any_other_and_comes_back(of, to):
    """Through D, in float64, from sigma = 0.001 to 1000."""
    x = operands(LEVELS)["x"]
    given = normal(0, Stream.CHURN, torch.arange(len(x)), (3, 4, 4)).double()
    other = prediction_of(denoised_of(given, x, LEVELS, PREDICTIONS[of]), x, LEVELS, PREDICTIONS[to])
    back = prediction_of(denoised_of(other, x, LEVELS, PREDICTIONS[to]), x, LEVELS, PREDICTIONS[of])
    torch.testing.assert_close(back, given, rtol=1e-12, atol=1e-12)


def test_v_is_edm_with_unit_pixels_and_the_sign_turned():
    torch.testing.assert_close(V().c_skip(SIGMA), EDM(1.0).c_skip(SIGMA))
    torch.testing.assert_close(V().c_out(SIGMA), -EDM(1.0).c_out(SIGMA))
    torch.testing.assert_close(V().c_in(SIGMA), EDM(1.0).c_in(SIGMA))


def test_without_noise_the_denoised_picture_is_the_picture():
    x, zero = torch.randn(2, 3, 4, 4), torch.zeros(2)
    for name, precond in PREDICTIONS.items():
        raw = x if name == "x0" else torch.randn_like(x)
        torch.testing.assert_close(denoised_of(raw, x, zero, precond), x)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.0, math.inf])
def test_the_singular_ends_are_refused_with_a_way_out(name, sigma):
    x, levels = torch.randn(2, 3, 4, 4), torch.tensor([1.0, sigma])
    if name == "x0" and sigma == 0:
        assert torch.equal(prediction_of(x, x, levels, X0()), x)
        return
    with pytest.raises(ValueError, match=r"At 0 ask for x0.*last finite level"):
        prediction_of(x, x, levels, PREDICTIONS[name])


def test_an_unknown_prediction_is_refused_by_name():
    with pytest.raises(ValueError, match="choose one of edm, epsilon, v, x0"):
        precond_of("noise", 0.5)


@pytest.mark.parametrize(("name", "kind"), [("epsilon", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_predictions_mean_what_they_mean_in_diffusers(name, kind):
    """One DDIM step to alpha_bar = 1 returns diffusers' idea of x0; float32 is where its scheduler computes."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[::3]:
        sigma = (1 / scheduler.alphas_cumprod[t].double() - 1).sqrt().view(1)
        z, given = torch.randn(1, 3, 4, 4).double(), torch.randn(1, 3, 4, 4).double()
        theirs = scheduler.step(given, int(t), z).pred_original_sample
        ours = denoised_of(given, z * (1 + sigma**2).sqrt(), sigma, PREDICTIONS[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_fresh_denoiser_of_each_prediction_answers_its_skip(name):
    denoise = denoiser_of(UNET, resolution=16, classes=3, sigma_data=0.5, precision="fp32", prediction=name)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 4.0])
    torch.testing.assert_close(denoise(x, sigma), x * PREDICTIONS[name].c_skip(sigma).view(2, 1, 1, 1))


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
