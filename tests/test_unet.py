import pytest
import torch

from diffusion.unet import UNet

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": (1, 1), "attention": (4,), "classes": 3}


def awake(**changes):
    """A small U-Net whose zero-initialized layers are not zero, so that everything in it matters."""
    net = UNet(**SMALL | {"resolution": 16, "stem": 2} | changes).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def answer(net, x, c_noise=0.3, label=1):
    with torch.no_grad():
        return net(x, torch.full((len(x),), c_noise), torch.full((len(x),), label))


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("resolution", [16, 32])
def test_the_picture_keeps_its_shape(stem, resolution):
    x = torch.randn(2, 3, resolution, resolution)
    assert answer(awake(stem=stem, resolution=resolution), x).shape == x.shape


def test_it_starts_at_zero():
    net = UNet(**SMALL, resolution=16, stem=2)
    assert not answer(net, torch.randn(2, 3, 16, 16)).any()


def test_noise_level_label_and_picture_all_matter():
    net, x = awake(), torch.randn(2, 3, 16, 16)
    base = answer(net, x)
    for other in (answer(net, x, c_noise=-0.4), answer(net, x, label=3), answer(net, x + 0.1)):
        assert (other - base).abs().max() > 1e-3


def test_pictures_of_a_batch_do_not_see_each_other():
    net, x = awake(), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(answer(net, x)[:1], answer(net, x[:1]), rtol=1e-4, atol=1e-5)


def test_the_receptive_field_is_the_whole_picture():
    x = torch.zeros(1, 3, 16, 16)
    far = x.clone()
    far[..., 0, 0] = 1
    net = awake()
    assert (answer(net, far) - answer(net, x))[..., -1, -1].abs().max() > 0


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (UNet(**SMALL, resolution=16, stem=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
