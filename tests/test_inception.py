"""Inception-v3 of the Frechet distances: another writing of the network agrees, and files of its weights are read."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.extractors.inception import DIMENSIONS, Inception, inception
from diffusion.evaluation.extractors.resize import BICUBIC, TENSORFLOW, tensorflow1

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random ones under which signals keep their size."""
    generator = torch.Generator().manual_seed(0)
    state = Inception().state_dict()
    for name, value in state.items():
        if value.ndim == 4:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.is_floating_point():
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    return state


class Slow:
    """The graph as its node list has it: each convolution by its name and shape, folded with its batch norm."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1, valid: bool = False) -> Tensor:
        w = self.weights
        scale = w[f"{name}.bn.weight"] / (w[f"{name}.bn.running_var"] + 0.001).sqrt()
        kernel = w[f"{name}.conv.weight"] * scale.view(-1, 1, 1, 1)
        shift = w[f"{name}.bn.bias"] - w[f"{name}.bn.running_mean"] * scale
        padding = (0, 0) if valid else ((kernel.shape[2] - 1) // 2, (kernel.shape[3] - 1) // 2)
        return F.conv2d(x, kernel, shift, stride, padding).clamp(min=0)

    def chain(self, x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = self.conv(x, f"{block}.{name}")
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Of a pixel and those of its neighbours that there are."""
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
        return sums / F.conv2d(ones, kernel, padding=1)

    def __call__(self, x: Tensor) -> Tensor:
        x = (x.double() - 128) / 128
        x = self.conv(x, "Conv2d_1a_3x3", 2, valid=True)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
        x = self.conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", valid=True), 3, 2)
        for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            five = self.chain(x, b, "branch5x5_1", "branch5x5_2")
            double = self.chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
            x = torch.cat([self.chain(x, b, "branch1x1"), five, double, self.chain(self.mean(x), b, "branch_pool")], 1)
        double = self.chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
        ends = ((x, "Mixed_6a.branch3x3"), (double, "Mixed_6a.branch3x3dbl_3"))
        x = torch.cat([*(self.conv(y, name, 2, valid=True) for y, name in ends), F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            seven = self.chain(x, b, *(f"branch7x7_{i}" for i in (1, 2, 3)))
            double = self.chain(x, b, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
            x = torch.cat([self.chain(x, b, "branch1x1"), seven, double, self.chain(self.mean(x), b, "branch_pool")], 1)
        three = self.chain(x, "Mixed_7a", "branch3x3_1")
        seven = self.chain(x, "Mixed_7a", *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
        ends = ((three, "Mixed_7a.branch3x3_2"), (seven, "Mixed_7a.branch7x7x3_4"))
        x = torch.cat([*(self.conv(y, name, 2, valid=True) for y, name in ends), F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_7b", "Mixed_7c"):
            three = self.chain(x, b, "branch3x3_1")
            double = self.chain(x, b, "branch3x3dbl_1", "branch3x3dbl_2")
            forks = [self.chain(three, b, f"branch3x3_2{side}") for side in "ab"]
            forks += [self.chain(double, b, f"branch3x3dbl_3{side}") for side in "ab"]
            pooled = self.mean(x) if b == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
            x = torch.cat([self.chain(x, b, "branch1x1"), *forks, self.chain(pooled, b, "branch_pool")], 1)
        return x.mean((2, 3))


@torch.no_grad()
def test_the_network_is_that_of_its_node_list(weights):
    x = torch.randint(0, 256, (2, 3, 107, 107), generator=torch.Generator().manual_seed(1)).float()
    expected, found = Slow(weights)(x), inception(weights)(x)
    assert found.shape == (2, DIMENSIONS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_it_has_the_parameters_of_the_published_network():
    """As torchvision counts: 27,161,264 less those of the auxiliary classifier and of its 1,000 classes."""
    network = Inception()
    assert sum(parameter.numel() for parameter in network.parameters()) == 27_161_264 - 3_326_696 - 1000 * 2049
    assert {"Mixed_7c.branch3x3dbl_3b.bn.running_var", "Mixed_6a.branch3x3.conv.weight"} <= network.state_dict().keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_alone_are_read_by_either_name(weights, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"pt_inception{suffix}"
    published = weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(published, path) if suffix == ".pth" else safetensors.torch.save_file(published, path)
    monkeypatch.setenv("DIFFUSION_EXTRACTOR_INCEPTION_V3", str(path))
    clean, first = (extractor(name, resolution=299) for name in ("inception-v3", "inception-v3-tf"))
    assert (clean.identity.resize, first.identity.resize) == (BICUBIC, TENSORFLOW)
    assert clean.identity.digest == first.identity.digest
    assert torch.equal(clean.network.Conv2d_1a_3x3.conv.weight, weights["Conv2d_1a_3x3.conv.weight"])


def test_the_resize_is_the_extractors_own(weights, tmp_path):
    class Sees(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 140:144].flatten(1)

    torch.jit.script(Sees()).save(str(tmp_path / "sees.pt"))
    picture = torch.randint(0, 256, (1, 32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    found = extractor("inception-v3-tf", resolution=299, weights=tmp_path / "sees.pt")(picture)
    expected = tensorflow1(picture.permute(0, 3, 1, 2).float(), 299)[:, 0, 140:144].flatten(1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_other_weights_are_refused_by_name(weights):
    with pytest.raises(ValueError, match=r"Mixed_7a\.branch3x3_1\.bn\.bias is missing"):
        inception({name: value for name, value in weights.items() if name != "Mixed_7a.branch3x3_1.bn.bias"})
    with pytest.raises(ValueError, match="layer1 is unknown"):
        inception(weights | {"layer1": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3\.conv\.weight"):
        inception(weights | {"Conv2d_1a_3x3.conv.weight": torch.zeros(2, 3, 3, 3)})
