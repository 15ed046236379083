import numpy as np
import pytest
import torch
from torch import nn

from diffusion.ema import PowerEMA, Snapshot, combine, gamma_of_sigma_rel, post_hoc_coefficients


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


STEPS, WIDTHS = 512, (0.05, 0.1)
STORED = [Snapshot(k * STEPS // 16, s) for k in range(1, 17) for s in WIDTHS]


def profile(snapshot: Snapshot, tau: np.ndarray) -> np.ndarray:
    gamma = gamma_of_sigma_rel(snapshot.sigma_rel)
    t = snapshot.images_seen
    return np.where(tau <= t, (gamma + 1) / t * (tau / t) ** gamma, 0.0)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_post_hoc_coefficients_are_the_constrained_least_squares_fit_of_profiles(sigma_rel):
    """An independent slow version: the profiles on a fine grid, fitted by QR, the sum's constraint as a heavy row."""
    target = Snapshot(STEPS, sigma_rel)
    found, error = post_hoc_coefficients(STORED, target)
    tau = (np.arange(20_000) + 0.5) * STEPS / 20_000
    columns = np.stack([profile(s, tau) for s in STORED], axis=1)
    wanted = profile(target, tau)
    heavy = 1e6 * np.ones((1, len(STORED)))
    fit = np.linalg.lstsq(np.vstack([columns, heavy]), np.append(wanted, 1e6), rcond=None)[0]
    left = np.linalg.norm(columns @ found - wanted) / np.linalg.norm(wanted)
    best = np.linalg.norm(columns @ fit - wanted) / np.linalg.norm(wanted)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert left == pytest.approx(error, rel=1e-2)
    assert left == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize(("images_seen", "sigma_rel"), [(STEPS, 0.03), (STEPS, 0.07), (STEPS, 0.2), (400, 0.12)])
def test_post_hoc_average_is_the_true_average_within_its_bound(images_seen, sigma_rel):
    """A wandering, settling, noisy trajectory around 1: the average that was never kept, from two that were."""
    rng = np.random.default_rng(0)
    time = np.arange(1, STEPS + 1) / STEPS
    wander = np.cumsum(rng.normal(size=(STEPS, 8)), axis=0) / np.sqrt(STEPS) * (1.2 - time)[:, None]
    weights = 1 + wander + 0.2 * rng.normal(size=(STEPS, 8))
    net = nn.Linear(8, 1, bias=False)
    ema, stored, true = PowerEMA(net, (*WIDTHS, sigma_rel)), [], None
    for k, row in enumerate(weights, start=1):
        with torch.no_grad():
            net.weight.copy_(torch.from_numpy(row)[None])
        ema.update(net, k, 1)
        if k % (STEPS // 16) == 0:
            stored += [{"weight": ema.state_dict(s)["weight"].clone()} for s in WIDTHS]
        if k == images_seen:
            true = ema.state_dict(sigma_rel)["weight"].clone()
    target = Snapshot(images_seen, sigma_rel)
    coefficients, error = post_hoc_coefficients(STORED, target)
    difference = (combine(stored, coefficients)["weight"] - true)[0].numpy()
    gamma = gamma_of_sigma_rel(sigma_rel)
    length = (gamma + 1) / np.sqrt(2 * gamma + 1)  # of the target's profile on [0, 1]
    bound = error * length * np.sqrt(((weights - weights[images_seen - 1]) ** 2).sum(axis=0) / images_seen)
    assert (abs(difference) <= bound + 1e-6).all()
    nearest = min(np.abs((ema.state_dict(s)["weight"] - true)[0].numpy()).max() for s in WIDTHS)
    assert abs(difference).max() < 0.15 * nearest


def test_a_width_that_was_kept_comes_back_as_it_is():
    coefficients, error = post_hoc_coefficients(STORED, Snapshot(STEPS, 0.1))
    assert coefficients == pytest.approx([0.0] * (len(STORED) - 1) + [1.0], abs=1e-6)
    assert error < 1e-6


def test_weights_that_stand_still_are_reconstructed_whatever_the_error():
    coefficients, error = post_hoc_coefficients([Snapshot(50, 0.1), Snapshot(100, 0.1)], Snapshot(100, 0.25))
    assert error > 0.1
    still = {"weight": torch.tensor([3.0, -7.0])}
    torch.testing.assert_close(combine([still, still], coefficients), still)


@pytest.mark.parametrize(
    ("snapshots", "target", "word"),
    [
        ([], Snapshot(10, 0.1), "no snapshots"),
        ([Snapshot(10, 0.1)], Snapshot(11, 0.1), "the last snapshot is of images_seen=10"),
        ([Snapshot(10, 0.1)], Snapshot(10, 0.3), "between 0 and 0.28"),
        ([Snapshot(0, 0.1), Snapshot(10, 0.1)], Snapshot(10, 0.1), "images_seen >= 1"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(snapshots, target, word):
    with pytest.raises(ValueError, match=word):
        post_hoc_coefficients(snapshots, target)


def test_averages_of_different_networks_do_not_add_up():
    with pytest.raises(ValueError, match=r"different networks: \['a', 'b'\]"):
        combine([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], [0.5, 0.5])
