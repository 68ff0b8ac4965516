"""One picture of a folder -> a patch of the size wanted, uint8, with where it was cut."""

from __future__ import annotations

import errno
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from online_patching.resample import resize
from pathfm.datasets.folder import MAX_PIXELS
from pathfm.datasets.pixels import FORMATS, unfit
from pathfm.runtime import PathfmError, one_line

Fit = Literal["resize", "crop"]
Pixels = NDArray[np.uint8]
MAX_FILE_BYTES = 256 * 2**20
_JPEG = b"\xff\xd8\xff"
_OF_THE_MACHINE = (
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
)


class UnreadablePictureError(PathfmError):
    """A file that is gone, damaged, no picture or too large: another is read in its place."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: not a readable picture ({reason}). Remove it")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Cut:
    """What of a picture becomes the patch: a square at (x_px, y_px), `side_px` of the picture's pixels
    across, read as `size_px` x `size_px`."""

    x_px: int
    y_px: int
    side_px: int


def cut_of(width_px: int, height_px: int, size_px: int, fit: Fit, u: float, v: float) -> Cut:
    """Where a patch lies in a picture; u, v in [0, 1) choose among the whole-pixel origins there are.

    resize: the largest square, so its side is the picture's shorter one. crop: a square of `size_px`,
    or the largest where the picture is smaller. A picture of just that size leaves nothing to choose.
    """
    side = min(width_px, height_px)
    side = min(side, size_px) if fit == "crop" else side
    return Cut(int(u * (width_px - side + 1)), int(v * (height_px - side + 1)), side)


def read_patch(path: Path, size_px: int, fit: Fit, u: float, v: float) -> tuple[Pixels, Cut]:
    """The patch (size_px, size_px, 3) of a picture file, and what of it that is.

    Resized by the triangle filter that patches of slides are resized by. A JPEG's damage is an error
    (libjpeg's warnings too). UnreadablePictureError names a file that is gone, damaged or larger than
    64 Mpx; PathfmError where the machine cannot read at the moment (an I/O error, too many open files).
    """
    picture = read_rgb(path)
    height, width = picture.shape[:2]
    cut = cut_of(width, height, size_px, fit, u, v)
    square = picture[cut.y_px : cut.y_px + cut.side_px, cut.x_px : cut.x_px + cut.side_px]
    if cut.side_px != size_px:
        side = float(cut.side_px)
        square = resize(np.ascontiguousarray(square), (0.0, 0.0, side, side), (size_px, size_px))
    return square, cut


def read_rgb(path: Path) -> Pixels:
    """A picture file as RGB (height, width, 3): the pixels Pillow gives, JPEGs in half its time."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        if data.startswith(_JPEG):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _refuse_large(width, height)
            if colours in ("YCbCr", "RGB"):
                return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_large(*image.size)
            if reason := unfit(image):
                raise ValueError(reason)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:  # its message has an address in memory
        raise UnreadablePictureError(path, "of no kind that Pillow knows") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        if error.errno in _OF_THE_MACHINE:
            raise PathfmError(f"{path}: {reason}. The run can go on when it is readable") from None
        raise UnreadablePictureError(path, reason) from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(path, one_line(error) or type(error).__name__) from None


def _refuse_large(width_px: int, height_px: int) -> None:
    if width_px * height_px > MAX_PIXELS:
        raise ValueError(
            f"{width_px:,} x {height_px:,} px is no patch; the limit is {MAX_PIXELS:,} px"
        )
