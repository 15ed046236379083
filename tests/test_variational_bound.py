"""The variational bound against integrals, its definition by hand, and known likelihoods."""

import math
from functools import partial

import pytest
import torch

from diffusion.analytic import GaussianMixture
from diffusion.process import (
    Chain,
    decodable,
    decoder_nll,
    gaussian_kl,
    l_weighted,
    prior_kl,
    transition_kl,
    variational_bound,
)
from diffusion.schedule import betas_of_sigmas, cosine_betas, exponential_sigmas, source_text_betas, zero_terminal_snr
from tests.chains import F64, every_chain, noises, steps


def test_gaussian_kl_is_its_integral():
    x = torch.linspace(-30, 30, 200_001, dtype=F64)
    q, p = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    integral = torch.trapezoid(q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x)), x)
    mean, variance, other = torch.tensor([[0.3, 0.3]]).double(), torch.tensor([0.49]), torch.tensor([1.9**2])
    kl = gaussian_kl(mean, variance.double(), torch.full((1, 2), -1.0), other.double())
    assert kl.item() == pytest.approx(2 * integral.item(), rel=1e-6)
    assert gaussian_kl(mean, variance, mean, variance).item() == 0


@every_chain
def test_the_prior_term_by_hand(chain):
    x0 = noises(1, 3, 2, 4)
    alpha_bar = math.prod(1 - b for b in chain.betas.tolist())
    wanted = (alpha_bar * (x0**2 - 1) - (math.log1p(-alpha_bar) if alpha_bar else 0)).sum(dim=(1, 2)) / 2
    torch.testing.assert_close(prior_kl(x0, chain), wanted, rtol=1e-8, atol=1e-15)
    assert prior_kl(x0, chain).any() == (chain.betas[-1] < 1)


@every_chain
def test_transitions_are_l_weighted_with_ddpms_own_weight(chain):
    """beta_t^2 / (2 v_t (1 - beta_t) (1 - alpha_bar_t)) of the error of epsilon [DDPM, Eq. 12] plus what no network
    changes; and, with the posterior's variances, VDM's difference of SNRs."""
    x0, noise = noises(1, 18, 2, 3), noises(2, 18, 2, 3)
    t = torch.arange(2, 20)  # at 20 the first form is 0 / 0 in two of the chains

    def denoise(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1) ** 2)

    for variances in (chain.betas, chain.posterior_variances):
        kl = transition_kl(denoise, x0, t, noise, chain, variances)
        weights = chain.betas**2 / (2 * variances * (1 - chain.betas) * chain.spread**2)
        ratio = (chain.posterior_variances / variances)[t - 1]
        rest = 6 * (ratio - 1 - ratio.log()) / 2
        torch.testing.assert_close(kl, 6 * l_weighted(denoise, x0, t, noise, chain, weights) + rest)
    error = (denoise(x0 + chain.sigmas[t - 1].view(-1, 1, 1) * noise, chain.sigmas[t - 1]) - x0).square().sum((1, 2))
    snr = chain.sigmas**-2
    torch.testing.assert_close(kl, (snr[t - 2] - snr[t - 1]) / 2 * error)
    with pytest.raises(ValueError, match="t >= 2"):
        transition_kl(denoise, x0, t - 1, noise, chain, chain.betas)


VALUES = torch.linspace(-1, 1, 256, dtype=F64).view(256, 1)


@pytest.mark.parametrize("deviation", [0.001, 0.01, 0.5, 20.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.2, 1.0])
def test_the_decoder_is_a_distribution_of_256_values(mean, deviation):
    nll = decoder_nll(torch.full((256, 1), mean, dtype=F64), VALUES, deviation**2)
    assert nll.isfinite().all()
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_decoder_by_hand_and_far_in_its_tails():
    normal_ = torch.distributions.Normal(0.1, 0.25)
    for k in (0, 100, 140, 255):
        edge = VALUES[k].item()
        upper = 1.0 if k == 255 else normal_.cdf(torch.tensor(edge + 1 / 255, dtype=F64)).item()
        lower = 0.0 if k == 0 else normal_.cdf(torch.tensor(edge - 1 / 255, dtype=F64)).item()
        ours = decoder_nll(torch.full((1, 1), 0.1, dtype=F64), VALUES[k : k + 1], 0.0625).item()
        assert ours == pytest.approx(-math.log(upper - lower), rel=1e-5)
    # 1000 deviations off: ln of the density at the nearer edge, -(1 - 1/255)^2 / (2 0.001^2), leads; no inf, no 1e-12
    far = decoder_nll(torch.zeros(1, 1), torch.ones(1, 1), 1e-6).item()
    assert far == pytest.approx((254 / 255) ** 2 / 2e-6, rel=1e-4)
    assert decoder_nll(torch.zeros(1, 1), -torch.ones(1, 1), 1e-6).item() == pytest.approx(far, rel=1e-6)


def test_the_decoder_adds_over_the_picture_and_wants_256_values():
    x0 = VALUES.view(4, 64, 1, 1)
    alone = decoder_nll(0.1 * VALUES, VALUES, 0.01).view(4, 64).sum(dim=1)
    torch.testing.assert_close(decoder_nll(0.1 * x0, x0, 0.01), alone)
    assert torch.equal(decoder_nll(0.1 * x0.float(), x0.float(), 0.01) > 0, torch.ones(4).bool())
    for wrong in (VALUES + 1 / 255, VALUES * 2, VALUES / 2):
        with pytest.raises(ValueError, match="uint8 picture"):
            decoder_nll(wrong, wrong, 0.01)


# x0 ~ N(0.05, 0.015^2) rounded to uint8 is a mixture of points: its likelihood and its denoiser are known exactly.
LEVELS = VALUES[(VALUES[:, 0] - 0.05).abs() < 0.1]
MASSES = torch.exp(-decoder_nll(torch.full_like(LEVELS, 0.05), LEVELS, 0.015**2))
MASSES /= MASSES.sum()
ROUNDED = GaussianMixture(MASSES, LEVELS, torch.zeros(len(LEVELS), dtype=F64))
ENTROPY = -(MASSES * MASSES.log2()).sum().item()
NODES = torch.linspace(-7, 7, 57, dtype=F64)  # the trapezoidal rule over the noise: exact to 1e-6 bits here


def expected_bound(denoise, chain: Chain, variances: torch.Tensor) -> tuple[float, float, float]:
    """Prior, transitions and decoder in the mean over x0 and noise, by quadrature; one pixel."""
    x0 = LEVELS.repeat_interleave(len(NODES), dim=0)
    noise = NODES.repeat(len(LEVELS))[:, None]
    gauss = (-(NODES**2) / 2).exp()
    weights = torch.outer(MASSES, gauss / gauss.sum()).flatten()
    bound = variational_bound(denoise, x0, lambda t: noise, chain, variances)
    assert bound.transitions.shape == (len(x0), len(chain.betas) - 1)
    torch.testing.assert_close(bound.total, bound.prior + bound.transitions.sum(dim=1) + bound.decoder)
    return tuple(float(weights @ term) for term in (bound.prior, bound.transitions.sum(dim=1), bound.decoder))


@pytest.mark.parametrize("variances", ["betas", "posterior_variances"])
def test_the_bound_of_a_gaussian_converges_to_its_likelihood(variances):
    """From above, and its excess halves as T doubles: the error of D grows with sigma, so that the sum over the steps
    is an upper sum of the integral which is the entropy.  [VDM, Sec. 5]"""

    def excess(n: int) -> float:
        # so fine at its clean end that z_1 tells the value, which leaves nothing to the decoder
        sigmas = exponential_sigmas(n, sigma_min=5e-4, sigma_max=10.0)[:-1].flip(0)
        chain = Chain(betas_of_sigmas(sigmas))
        prior, transitions, decoder = expected_bound(ROUNDED.denoise, chain, decodable(getattr(chain, variances)))
        assert prior < 1e-4
        assert decoder < 1e-12
        return transitions + prior + decoder - ENTROPY

    short, long = excess(64), excess(128)
    assert 0 < long < 0.2 * ENTROPY
    assert math.log2(short / long) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("make", [source_text_betas, lambda n: zero_terminal_snr(cosine_betas(n))])
def test_the_bound_holds_for_any_schedule_variance_and_denoiser(make):
    """Above the entropy, with zero terminal SNR too; and a worse denoiser has a worse bound."""
    chain = Chain(make(24))
    for variances in (chain.betas, decodable(chain.posterior_variances)):
        prior, *rest = expected_bound(ROUNDED.denoise, chain, variances)
        assert prior == 0
        assert ENTROPY < sum(rest) < 8
        worse = expected_bound(lambda x, sigma: ROUNDED.denoise(x, sigma) + 0.01, chain, variances)
        assert sum(worse) > sum(rest)


def test_the_bound_of_a_picture_is_the_mean_over_its_values():
    chain, drawn = Chain(cosine_betas(10)), noises(1, 10, 2, 3, 4, 4)
    x0 = LEVELS[torch.arange(96) % len(LEVELS)].view(2, 3, 4, 4)

    def denoise(x, sigma):
        rows = sigma.repeat_interleave(x[0].numel())
        return ROUNDED.denoise(x.reshape(-1, 1), rows).view(x.shape)

    variances = decodable(chain.posterior_variances)
    whole = variational_bound(denoise, x0, lambda t: drawn[t[0] - 1], chain, variances)
    for t in range(2, 11):  # each from its own draw
        nats = transition_kl(denoise, x0, steps(t, 2), drawn[t - 1], chain, variances)
        torch.testing.assert_close(whole.transitions[:, t - 2], nats / (48 * math.log(2)))
    alone = variational_bound(denoise, x0.reshape(96, 1), lambda t: drawn[t[0] - 1].reshape(96, 1), chain, variances)
    for term, parts in zip(whole, alone, strict=True):
        torch.testing.assert_close(term, parts.unflatten(0, (2, 48)).mean(dim=1))
    with pytest.raises(ValueError, match="decodable"):
        variational_bound(denoise, x0, lambda t: drawn[t[0] - 1], chain, chain.posterior_variances)


def test_a_condition_is_bound_beforehand():
    def denoise(x, sigma, label):
        return label.view(-1, 1).to(x).expand_as(x)

    chain, x0 = Chain(cosine_betas(3)), torch.tensor([[-1.0], [1.0]])
    bound = variational_bound(
        partial(denoise, label=torch.tensor([-1, 1])), x0, lambda t: torch.zeros_like(x0), chain, chain.betas
    )
    assert bound.transitions[:, 0].tolist() == pytest.approx(
        [bound.transitions[0, 0].item()] * 2
    )  # no error left: variances alone
    one_step = variational_bound(
        partial(denoise, label=torch.tensor([-1, 1])), x0, lambda t: x0, Chain(torch.tensor([1.0])), torch.ones(1)
    )
    assert one_step.transitions.shape == (2, 0)
    assert not one_step.prior.any()
