import math

import pytest
import torch

from diffusion.schedule import karras_sigmas, log_normal_sigma


def test_karras_sigmas_are_equally_spaced_in_their_root():
    sigmas = karras_sigmas(10, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    assert sigmas.shape == (11,)
    assert sigmas[0].item() == pytest.approx(50.0)
    assert sigmas[-2].item() == pytest.approx(0.01)
    assert sigmas[-1] == 0
    roots = sigmas[:-1] ** (1 / 5.0)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))


def test_one_level_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        karras_sigmas(1, sigma_min=0.1, sigma_max=1.0)


def test_log_normal_sigma_has_its_quantiles():
    median, one_above = log_normal_sigma(torch.tensor([0.5, 0.8413447460685429]), mean=-1.0, std=1.5)
    assert median.item() == pytest.approx(math.exp(-1.0))
    assert one_above.item() == pytest.approx(math.exp(0.5), rel=1e-5)
