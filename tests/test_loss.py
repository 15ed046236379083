import torch

from diffusion.denoiser import Precond
from diffusion.loss import denoising_loss
from diffusion.random import Stream, normal

SIGMA = torch.tensor([0.05, 0.5, 5.0, 50.0]).repeat_interleave(64)
INDEX = torch.arange(256)
X0 = 0.5 * normal(0, Stream.INITIAL, INDEX, (3, 16, 16))
NOISE = normal(0, Stream.NOISE, INDEX, (3, 16, 16))


def loss(denoise):
    return denoising_loss(denoise, Precond(0.5), X0, NOISE, SIGMA, {})


def test_a_perfect_denoiser_has_no_loss():
    assert not loss(lambda x, sigma: X0).any()


def test_the_best_linear_denoiser_has_loss_one_at_every_level():
    """For x0 ~ N(0, sigma_data^2) c_skip x is E[x0 given x], and the weight makes what is left 1."""
    levels = loss(lambda x, sigma: Precond(0.5).c_skip(sigma.view(-1, 1, 1, 1)) * x).view(4, 64).mean(dim=1)
    torch.testing.assert_close(levels, torch.ones(4), rtol=0.02, atol=0)


def test_each_picture_has_its_own_loss():
    def wrong_in_one(x, sigma):
        out = X0.clone()
        out[7] += 0.1
        return out

    values = loss(wrong_in_one)
    assert values.nonzero().flatten().tolist() == [7]
    torch.testing.assert_close(values[7], Precond(0.5).weight(SIGMA[7]) * 0.01)
