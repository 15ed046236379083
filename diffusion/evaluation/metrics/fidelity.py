"""How near a restored picture is to the true one, pixel by pixel and window by window."""

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _WINDOW_STD = 11, 1.5  # of the Gaussian window  [Wang et al. 2004, Sec. III-B]
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB; infinite where it equals the truth.

    pictures, truth: uint8 (B, H, W, 3).  Returns (B,) float64: 10 log10(255^2 / mean squared error).
    """
    a, b = _checked(pictures, truth)
    return 10 * (255**2 / (a - b).square().mean(dim=(1, 2, 3))).log10()


def ssim(pictures: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each picture, at most 1, and 1 where it equals the truth.  [Wang et al. 2004, Eq. 13]

    pictures, truth: uint8 (B, H, W, 3), sides of at least 11.  Returns (B,) float64: the mean over all whole windows and
    over the three channels, each channel for itself.
    """
    a, b = _checked(pictures, truth)
    if min(a.shape[2:]) < _WINDOW:
        raise ValueError(f"ssim looks at windows of {_WINDOW} x {_WINDOW}; the pictures are {tuple(a.shape[2:])}")
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _checked(pictures: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 (B, 3, H, W) in 0..255."""
    for what in (pictures, truth):
        if what.dtype != torch.uint8 or what.ndim != 4 or what.shape[3] != 3:
            raise ValueError(f"give pictures as uint8 (B, H, W, 3), not {what.dtype} {tuple(what.shape)}")
    if pictures.shape != truth.shape:
        raise ValueError(
            f"{tuple(pictures.shape)} pictures against {tuple(truth.shape)} true ones: give as many, as large"
        )
    return pictures.permute(0, 3, 1, 2).double(), truth.permute(0, 3, 1, 2).double()


def _blurred(x: Tensor) -> Tensor:
    """Weighted mean of each whole window.  (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    place = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    row = (-(place**2) / (2 * _WINDOW_STD**2)).exp()
    row = (row / row.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(x, row, groups=x.shape[1])
    return F.conv2d(x, row.transpose(2, 3), groups=x.shape[1])
