import pytest
import torch
from torch import nn

from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.training.optimizer import cost_of, divide, hidden_matrices, optimizer_of
from diffusion.unet import UNet

UNET = UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=())


def net():
    return UNet(**UNET.model_dump(), resolution=16, classes=3)


def with_gradients(network: nn.Module, value: float | None = None) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if value is None else torch.full_like(p, value)
    return network


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_belongs_to_one_part(name):
    network = net()
    groups = optimizer_of(TrainRecipe(unet=UNET, optimizer=name), network).param_groups
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in network.parameters())


def test_muon_takes_the_convolutions_between_stem_and_head():
    network = net()
    taken = {id(p) for p in hidden_matrices(network)}
    names = {name for name, p in network.named_parameters() if id(p) in taken}
    assert names
    assert all(any(part in name for part in ("conv", "skip", "merge")) and name.endswith("weight") for name in names)


def test_a_muon_step_is_orthogonal_and_of_the_size_of_an_adamw_step():
    """All singular values of a step are about equal, and its root mean square is 0.2 lr.  [Liu et al. 2025, Eq. 4]"""
    network = with_gradients(net())
    before = [p.clone() for p in hidden_matrices(network)]
    optimizer_of(TrainRecipe(unet=UNET, lr=0.01, weight_decay=0.0), network).step()
    for old, new in zip(before, hidden_matrices(network), strict=True):
        step = (new - old).detach()
        singular = torch.linalg.svdvals(step)
        assert singular.min() > 0.5 * singular.max()
        assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_skipped_step_changes_no_weight(name):
    network = with_gradients(net(), float("nan"))
    before = [p.clone() for p in network.parameters()]
    optimizer_of(TrainRecipe(unet=UNET, optimizer=name), network).step(skip=torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_step_that_is_not_skipped_is_the_same_step():
    one, two = with_gradients(net()), with_gradients(net())
    optimizer_of(TrainRecipe(unet=UNET), one).step()
    optimizer_of(TrainRecipe(unet=UNET), two).step(skip=torch.tensor(False))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_the_matrices_are_dealt_out_once_each_and_evenly(parts):
    matrices = hidden_matrices(net())
    shares = divide(matrices, parts)
    assert len(shares) == parts
    assert sorted(id(m) for share in shares for m in share) == sorted(id(m) for m in matrices)
    costs = [sum(cost_of(m) for m in share) for share in shares]
    assert max(costs) - min(costs) <= max(cost_of(m) for m in matrices)
