"""Every sampler against diffusers' schedulers, step by step, on the same network, levels and noise.

Their z = x / sqrt(1 + sigma^2) and their network predicts noise, x0 or v; ours asks for D.  The denoiser is the exact one
of a mixture, computed in float64 on both sides, so that all that can differ is the sampler.

DDPM, DDIM, UniPC and Heun compute in the sample's type and must agree to 1e-9 in float64, once their levels, which they keep
in float32, are overwritten.  DPMSolverMultistep, EulerDiscrete, EDMEuler and EDMDPMSolverMultistep cast the sample itself to
float32 in `step`: 1e-5.  Differences are taken between the z, which are of order 1.
"""

import math

import pytest
import torch

from diffusion.analytic import GaussianMixture
from diffusion.sampler import SAMPLERS, heun_churn

diffusers = pytest.importorskip("diffusers")

SHAPE = (4, 2, 3, 3)
MIXTURE = GaussianMixture(
    weights=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    means=torch.linspace(-10, 10, 3 * math.prod(SHAPE[1:]), dtype=torch.float64).sin().view(3, *SHAPE[1:]),
    stds=torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64),
)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SPACINGS = [
    *({"timestep_spacing": name} for name in ("leading", "trailing", "linspace")),
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]
SIGMA_DATA = 0.5  # of their EDM schedulers


def scheduler_of(kind, steps, dtype, **config):
    """A scheduler of theirs with its timesteps set, its levels in `dtype`."""
    scheduler = getattr(diffusers, kind)(**config)
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.to(dtype), dim=0)
    scheduler.set_timesteps(**({"timesteps": steps} if isinstance(steps, list) else {"num_inference_steps": steps}))
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.to(dtype)
        scheduler.set_begin_index(0)
    return scheduler


def asked_of(scheduler):
    """The sigma of each of their network calls, and 0: sqrt((1 - alpha_bar) / alpha_bar).  float64."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.double()
    alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)])


def denoise(x, sigma):
    return MIXTURE.denoise(x.double(), sigma.double()).to(x)


def predict(x, sigma, kind, dtype):
    """What a network of this kind of prediction answers at our x, if its denoiser is exact."""
    x = x.double()
    x0 = denoise(x, torch.full((len(x),), sigma, dtype=torch.float64))
    if kind == "edm":
        skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
        return ((x0 - skip * x) / (sigma * math.sqrt(skip))).to(dtype)
    epsilon, alpha = (x - x0) / sigma, 1 / math.sqrt(1 + sigma**2)
    return {"sample": x0, "epsilon": epsilon, "v_prediction": alpha * (epsilon - sigma * x0)}[kind].to(dtype)


def generator():
    return torch.Generator().manual_seed(1)


def noise_of(dtype):
    """Step number -> the noise that their schedulers draw in that step from `generator()`."""
    source, drawn = generator(), []

    def noise(i):
        while len(drawn) <= i:
            drawn.append(torch.randn(SHAPE, generator=source, dtype=dtype))
        return drawn[i]

    return noise


def start(sigma, dtype):
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigma).to(dtype)


def ours(name, sigmas, dtype):
    """(x, sigma) of every query, and of the end."""
    conversation = SAMPLERS[name](start(sigmas[0], dtype), sigmas, noise_of(dtype))
    query, visited = next(conversation), []
    while True:
        visited.append((query.x, float(query.sigma[0])))
        try:
            query = conversation.send(denoise(query.x, query.sigma))
        except StopIteration as done:
            return [*visited, (done.value, 0.0)]


def theirs(scheduler, dtype, *, explode=False, **options):
    """The same of a loop over their timesteps.  explode: the scheduler's sample is our x, not z."""
    asked, kind = asked_of(scheduler).tolist(), scheduler.config.prediction_type
    to_x = [1.0 if explode else math.sqrt(1 + sigma**2) for sigma in asked]
    kind = "edm" if type(scheduler).__name__.startswith("EDM") else kind
    sample, visited = start(asked[0], dtype) / to_x[0], []
    for i, t in enumerate(scheduler.timesteps):
        visited.append((sample * to_x[i], asked[i]))
        if explode:
            scheduler.scale_model_input(sample, t)
        sample = scheduler.step(predict(*visited[-1], kind, dtype), t, sample, **options).prev_sample
    return [*visited, (sample, 0.0)]


def assert_same_path(name, scheduler, dtype, **options):
    sigmas = torch.unique_consecutive(asked_of(scheduler))  # Heun's has most of them twice
    left, right = ours(name, sigmas, dtype), theirs(scheduler, dtype, **options)
    assert len(left) == len(right) == len(scheduler.timesteps) + 1 > 10
    for (x, sigma), (x_theirs, sigma_theirs) in zip(left, right, strict=True):
        assert x.dtype == dtype
        assert sigma == pytest.approx(sigma_theirs, rel=torch.finfo(dtype).eps)
        z, z_theirs = (value.double() / math.sqrt(1 + sigma**2) for value in (x, x_theirs))
        torch.testing.assert_close(z, z_theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("spacing", SPACINGS[:2], ids=str)
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddpm", 1.0)])
def test_ddim(name, eta, spacing, beta_schedule, prediction_type):
    """Not with `linspace`: there their step goes to t - T // n, which is not the next of their timesteps."""
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, "clip_sample": False, **spacing}
    scheduler = scheduler_of("DDIMScheduler", 10, torch.float64, **config)
    assert_same_path(name, scheduler, torch.float64, eta=eta, generator=generator())


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False}),
        ("ddpm", "DDPMScheduler", {"clip_sample": False}),
        ("ddpm_beta", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
    ],
)
def test_float32(name, kind, config):
    """Those that are compared in float64 below and above, as they are used."""
    options = {"generator": generator()} if "DDPM" in kind else {"explode": name == "heun"}
    assert_same_path(name, scheduler_of(kind, 10, torch.float32, **config), torch.float32, **options)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize(
    "steps", [10, [999, 937, 800, 650, 500, 350, 240, 130, 60, 20, 5, 0]], ids=["leading", "custom"]
)
@pytest.mark.parametrize(("name", "variance_type"), [("ddpm", "fixed_small"), ("ddpm_beta", "fixed_large")])
def test_ddpm(name, variance_type, steps, beta_schedule, prediction_type):
    """Every spacing that ends at t = 0.  Of one that does not, as `trailing`, they leave beta's noise in the picture."""
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, "clip_sample": False}
    scheduler = scheduler_of("DDPMScheduler", steps, torch.float64, variance_type=variance_type, **config)
    assert_same_path(name, scheduler, torch.float64, generator=generator())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("spacing", [*SPACINGS, {"use_lu_lambdas": True}], ids=str)
@pytest.mark.parametrize(("name", "prefix"), [("dpmpp_2m", ""), ("dpmpp_2m_sde", "sde-")])
def test_dpm_solver(name, prefix, spacing, beta_schedule, prediction_type):
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, **spacing}
    if beta_schedule == "squaredcos_cap_v2":
        config["lambda_min_clipped"] = -5.1  # as they advise for this schedule
    scheduler = scheduler_of(
        "DPMSolverMultistepScheduler", 12, torch.float32, algorithm_type=f"{prefix}dpmsolver++", **config
    )
    assert_same_path(name, scheduler, torch.float32, generator=generator())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_unipc(spacing, beta_schedule, prediction_type):
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, "solver_type": "bh2", **spacing}
    assert_same_path("unipc", scheduler_of("UniPCMultistepScheduler", 12, torch.float64, **config), torch.float64)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [("heun", "HeunDiscreteScheduler", torch.float64), ("ddim", "EulerDiscreteScheduler", torch.float32)],
)
def test_heun_and_euler(name, kind, dtype, spacing, beta_schedule, prediction_type):
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, **spacing}
    assert_same_path(name, scheduler_of(kind, 12, dtype, **config), dtype, explode=True)


@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("ddim", "EDMEulerScheduler", {}),
        ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_2m_sde", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_edm(name, kind, config, sigma_schedule):
    scheduler = scheduler_of(kind, 12, torch.float32, sigma_schedule=sigma_schedule, sigma_data=SIGMA_DATA, **config)
    options = {"generator": generator()} if "sde" in name else {}
    assert_same_path(name, scheduler, torch.float32, explode=True, **options)


def test_churn():
    """Their first-order step from the raised level is where our second-order one asks a second time.

    They ask the network before they add the noise, unlike [EDM, Alg. 2]: here they are given D at the raised level.
    """
    n, churn, interval, noise_scale = 12, 3.0, (0.05, 50.0), 1.1
    scheduler = scheduler_of("EDMEulerScheduler", n, torch.float32)
    sigmas, source, noise, x = (
        scheduler.sigmas.double(),
        generator(),
        noise_of(torch.float32),
        start(80.0, torch.float32),
    )
    drawn = iter(range(n))
    for i, t in enumerate(scheduler.timesteps):
        options = {
            "churn": churn / n,
            "interval": interval,
            "noise_scale": noise_scale,
        }  # n steps of ours of one step each
        ours = heun_churn(x, sigmas[i : i + 2], lambda _: noise(next(drawn)), **options)
        raised = next(ours)
        assert (raised.sigma[0] > scheduler.sigmas[i]) == (interval[0] <= sigmas[i] <= interval[1])
        denoised = denoise(raised.x, raised.sigma)
        try:
            x_euler = ours.send(denoised).x
        except StopIteration as done:
            x_euler = done.value
        scheduler.scale_model_input(x, t)
        names = {"s_churn": churn, "s_tmin": interval[0], "s_tmax": interval[1], "s_noise": noise_scale}
        x = scheduler.step(denoised, t, x, pred_original_sample=denoised, generator=source, **names).prev_sample
        torch.testing.assert_close(x_euler, x, rtol=1e-5, atol=1e-5)
    assert 0 < next(drawn) < n  # levels outside the interval added none
