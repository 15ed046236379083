import pytest
import torch

from diffusion.guidance import classifier_free, conditioned
from diffusion.sampler import ddim, heun, run
from diffusion.schedule import karras_sigmas

LABELS = {"label": torch.tensor([0, 1])}
NULL = {"label": torch.tensor([2, 2])}
SIGMAS = karras_sigmas(6, sigma_min=0.02, sigma_max=20.0)


def denoise(x, sigma, label):
    """A delta at a place that the label names."""
    return torch.tensor([-0.5, 0.5, 0.1])[label].view(-1, 1, 1, 1).expand_as(x)


def start():
    return torch.ones(2, 1, 2, 2) * 20


def test_conditioned_passes_the_condition_on():
    out = run(conditioned(heun(start(), SIGMAS), LABELS), denoise)
    torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([-0.5, 0.5]))


def test_guidance_extrapolates_from_the_null_answer():
    out = run(classifier_free(heun(start(), SIGMAS), LABELS, NULL, 3.0), denoise)
    torch.testing.assert_close(out[:, 0, 0, 0], 0.1 + 3 * (torch.tensor([-0.5, 0.5]) - 0.1))


def test_scale_one_is_no_guidance_and_costs_nothing():
    rows = []

    def counted(x, sigma, label):
        rows.append(len(x))
        return denoise(x, sigma, label)

    guided = run(classifier_free(ddim(start(), SIGMAS), LABELS, NULL, 1.0), counted)
    assert set(rows) == {2}
    assert torch.equal(guided, run(conditioned(ddim(start(), SIGMAS), LABELS), denoise))


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.5, 5.0)])
def test_outside_the_interval_only_the_conditional_answer_is_asked(interval):
    asked = []

    def counted(x, sigma, label):
        asked.append((float(sigma[0]), len(x)))
        return denoise(x, sigma, label)

    run(classifier_free(ddim(start(), SIGMAS), LABELS, NULL, 2.0, interval), counted)
    assert all(rows == (4 if interval[0] <= sigma <= interval[1] else 2) for sigma, rows in asked)
