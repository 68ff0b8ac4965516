"""What JPEG does to a picture, as arithmetic on batches: DCT, quantisation, DCT back.

ITU-T T.81: YCbCr (JFIF), 8x8 blocks, the example tables of annex K scaled by a quality 1..100 as
libjpeg does (`jpeg_quality_scaling`), chroma halved on both axes (4:2:0). There is no entropy
coding: it loses nothing.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# T.81 annex K, tables K.1 (luminance) and K.2 (chrominance).
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)  # fmt: skip
_CHROMA = np.full((8, 8), 99)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
_DCT = np.sqrt(np.where(np.arange(8) == 0, 1, 2) / 8)[:, None] * np.cos(
    (2 * np.arange(8)[None] + 1) * np.arange(8)[:, None] * np.pi / 16
)


def quantisation(quality: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B, 2, 8, 8) steps of luminance and chrominance for qualities 1..100, as libjpeg's."""
    q = np.clip(quality, 1, 100)
    scale = np.where(q < 50, 5000 // q, 200 - 2 * q)[:, None, None, None]
    table = (np.stack([_LUMA, _CHROMA])[None] * scale + 50) // 100
    return np.asarray(np.clip(table, 1, 255), np.float64)


def jpeg_artefacts(rgb: Tensor, quality: NDArray[np.int64], subsample: bool = True) -> Tensor:
    """(B, 3, h, w) in 0..1 after one pass of JPEG at each picture's quality; any h, w."""
    steps = torch.from_numpy(quantisation(quality)).to(rgb)
    matrix = torch.from_numpy(_TO_YCC).to(rgb)
    ycc = torch.einsum("dc,bchw->bdhw", matrix, rgb * 255)
    luma = _blockwise(ycc[:, :1] - 128, steps[:, :1]) + 128
    chroma = ycc[:, 1:]
    h, w = rgb.shape[2:]
    if subsample:
        padded = F.pad(chroma, (0, w % 2, 0, h % 2), mode="replicate")
        small = _blockwise(F.avg_pool2d(padded, 2), steps[:, 1:])
        chroma = F.interpolate(small, scale_factor=2, mode="bilinear")[:, :, :h, :w]
    else:
        chroma = _blockwise(chroma, steps[:, 1:])
    back = torch.linalg.inv(matrix)
    out = torch.einsum("dc,bchw->bdhw", back, torch.cat([luma, chroma], 1))
    return (out / 255).clamp(0, 1)


def _blockwise(planes: Tensor, steps: Tensor) -> Tensor:
    """(B, p, h, w) planes, their 8x8 DCT rounded to multiples of steps (B, 1, 8, 8)."""
    dct = torch.from_numpy(_DCT).to(planes)
    b, p, h, w = planes.shape
    padded = F.pad(planes, (0, -w % 8, 0, -h % 8), mode="replicate")
    rows, columns = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.view(b, p, rows, 8, columns, 8).transpose(3, 4)
    spectrum = dct @ blocks @ dct.T
    step = steps[:, :, None, None]
    spectrum = torch.round(spectrum / step) * step
    blocks = dct.T @ spectrum @ dct
    return blocks.transpose(3, 4).reshape(b, p, rows * 8, columns * 8)[:, :, :h, :w]
