import numpy as np
import pytest
import torch
from torch import nn

from diffusion.ema import PowerEMA, gamma_of_sigma_rel


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_is_what_the_paper_prints(sigma_rel, gamma):
    """[EDM2, Sec. 3.1]: sigma_rel = 0.05 and 0.10 mean gamma = 16.97 and 6.94."""
    assert gamma_of_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=0.005)


def test_gamma_solves_its_equation():
    gamma = gamma_of_sigma_rel(0.2)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.2**2)


def test_the_average_is_the_power_profile():
    """Weights that record the time give the profile's mean: the average of t under t^gamma on [0, 1]."""
    net, total, batch = nn.Linear(1, 1, bias=False), 20_000, 10
    ema = PowerEMA(net, (0.1,))
    for seen in range(batch, total + 1, batch):
        nn.init.constant_(net.weight, seen / total)
        ema.update(net, seen, batch)
    gamma = gamma_of_sigma_rel(0.1)
    assert ema.state_dict(0.1)["weight"].item() == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_initial_weights_are_forgotten_at_once():
    net = nn.Linear(3, 3)
    ema = PowerEMA(net, (0.05, 0.2))
    with torch.no_grad():
        net.weight.fill_(7.0)
    ema.update(net, 32, 32)
    assert all(torch.equal(ema.state_dict(s)["weight"], net.weight) for s in (0.05, 0.2))


def test_state_goes_out_and_in():
    net = nn.Linear(3, 3)
    one, two = PowerEMA(net, (0.1,)), PowerEMA(nn.Linear(3, 3), (0.1,))
    two.load_state_dict(0.1, one.state_dict(0.1))
    assert torch.equal(two.state_dict(0.1)["weight"], net.weight)
    with pytest.raises(KeyError, match=r"there are \[0\.1\]"):
        one.state_dict(0.2)
    with pytest.raises(ValueError, match="parameters differ"):
        two.load_state_dict(0.1, {"weight": torch.zeros(3, 3)})


def test_width_is_relative_to_the_run():
    """Twice the run, twice as coarse: the same profile."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    ends = []
    for repeat in (1, 40):
        net = nn.Linear(1, 1, bias=False)
        ema = PowerEMA(net, (0.15,))
        for k, value in enumerate(np.repeat(values, repeat)):
            nn.init.constant_(net.weight, value)
            ema.update(net, k + 1, 1)
        ends.append(ema.state_dict(0.15)["weight"].item())
    assert ends[0] == pytest.approx(ends[1], abs=0.05)
