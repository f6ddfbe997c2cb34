"""One image, from any file that hospitals and data sets use, as 8-bit RGB.

The rules, the same for every door:

- 8-bit grey becomes three equal channels; 1-bit becomes 0 and 255; palette, CMYK, YCbCr, LAB and HSV become RGB.
- Alpha is laid over black.
- The orientation of EXIF is applied.
- More than 8 bits (16-bit PNG and TIFF, float TIFF, arrays that are not uint8): the 0.5th and 99.5th percentile of the
  finite values become 0 and 255, values between them linearly; a constant image becomes 0.
- DICOM (extra `dicom`): rescale slope and intercept first, then the file's VOI table or its first window, without either
  the percentiles above (padding left out); MONOCHROME1 is inverted, so that more is always brighter. Colour DICOM becomes RGB.
- A file with several frames is refused: which one would be a guess.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from medlore.data.codestreams import check_codestream, check_deflated, is_deflated
from medlore.data.images.imageset import ImageItem
from medlore.data.images.trees import ArchiveMember, read_member
from medlore.errors import DataError
from medlore.extras import require
from medlore.files import refuse_device

MOST_PIXELS = 178_000_000  # the bound at which Pillow suspects a decompression bomb
MOST_BYTES = 2 << 30  # of one file
ACCEPTED = "a whole png, jpeg, bmp, tiff, gif, webp, pgm or single-frame DICOM file"
PERCENTILES = (0.5, 99.5)
# What Pillow and pydicom raise on broken content; a RuntimeError is also a DICOM compression without its decoder.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, AttributeError, TypeError, ArithmeticError,
    RuntimeError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip

Pixels = NDArray[np.uint8]


def load_pixels(item: ImageItem) -> Pixels:
    """The pixels of one image.

    Args:
        item: the image; its source is a file, an archive member or an array.

    Returns:
        (h, w, 3) uint8, RGB.

    Raises:
        DataError: missing, truncated, not an image, several frames, or too large; the message names the file.
        MissingExtraError: a DICOM file, and pydicom is not installed.

    Examples:
        >>> grey = ImageItem("a", np.full((2, 3), 7, np.uint8), ())
        >>> load_pixels(grey).shape
        (2, 3, 3)
    """
    if isinstance(item.source, np.ndarray):
        return pixels_of_array(item.source)
    try:
        content = _content(item.source)
        return _dicom_pixels(content) if content[128:132] == b"DICM" else _pillow_pixels(content)
    except DataError as error:
        raise DataError(str(item.source), error.came, error.accepted, error.fix) from error
    except _BROKEN as error:
        reason = "no format that is known here" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
        raise DataError(
            str(item.source), f"cannot be read as an image ({reason or type(error).__name__})", ACCEPTED, "copy or export the file again"
        ) from error


def load_many(items: Sequence[ImageItem], *, after: Callable[[Pixels], Pixels] | None = None, workers: int = 2) -> list[Pixels]:
    """The pixels of many images; every image that cannot be read is named in one error.

    Args:
        items: the images.
        after: what to do with each image as soon as it is read (a resize, say), so that large originals do not pile up.
        workers: threads; Pillow decodes and resizes outside Python's lock.

    Raises:
        DataError: one or more images cannot be read; all are listed.
    """

    def one(item: ImageItem) -> Pixels | DataError:
        try:
            pixels = load_pixels(item)
            return after(pixels) if after else pixels
        except DataError as error:
            return error

    # Pillow warns of odd metadata. The filters are one for all threads, so they are set here, once.
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        results = list(pool.map(one, items))
    faults = [f"{error.where}: {error.came}" for error in results if isinstance(error, DataError)]
    if len(faults) == 1:
        raise next(error for error in results if isinstance(error, DataError))
    if faults:
        raise DataError("images", f"{len(faults)} of {len(items)} cannot be read", ACCEPTED, "correct or remove them", faults=faults)
    return [pixels for pixels in results if not isinstance(pixels, DataError)]


def check_pixels(items: Iterable[ImageItem]) -> list[str]:
    """Every image that cannot be read, one line each; empty when all can."""
    faults = []
    for item in items:
        try:
            load_pixels(item)
        except DataError as error:
            faults.append(f"{error.where}: {error.came}")
    return faults


def pixels_of_array(array: NDArray[Any]) -> Pixels:
    """An array (h, w) or (h, w, c) of any number type as (h, w, 3) uint8, by the rules above.

    Examples:
        >>> pixels_of_array(np.array([[0, 500], [1000, 500]], np.uint16))[..., 0].tolist()
        [[0, 127], [255, 127]]
    """
    eight = array if array.dtype == np.uint8 else windowed(array)
    if eight.ndim == 2:
        eight = eight[..., None]
    if eight.shape[2] == 4:
        eight = np.asarray(_over_black(Image.fromarray(eight)))
    if eight.shape[2] == 1:
        eight = np.repeat(eight, 3, axis=2)
    return np.ascontiguousarray(eight[..., :3])


def windowed(
    values: NDArray[Any], *, low: float | None = None, high: float | None = None, valid: NDArray[np.bool_] | None = None
) -> Pixels:
    """Map `low` .. `high` to 0 .. 255, linearly and cut off.

    Args:
        values: any shape and number type; values that are not finite become 0.
        low: what becomes 0; default the 0.5th percentile of the finite values.
        high: what becomes 255; default the 99.5th percentile.
        valid: the values that percentiles are taken over; default all finite ones.
    """
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if low is None or high is None:
        counted = numbers[finite if valid is None else finite & valid]
        low, high = np.percentile(counted, PERCENTILES) if counted.size else (0.0, 0.0)
        if low == high and counted.size:  # nearly constant: a few other values still count
            low, high = counted.min(), counted.max()
    if not high > low:
        return np.zeros(values.shape, dtype=np.uint8)
    scaled = np.where(finite, (numbers - low) * (255.0 / (high - low)), 0.0)
    return np.asarray(np.clip(np.floor(scaled + 1e-6), 0, 255).astype(np.uint8))


def _content(source: Path | ArchiveMember | NDArray[Any]) -> bytes:
    if isinstance(source, ArchiveMember):
        return read_member(source)
    if not isinstance(source, Path):
        raise DataError("", f"a source of type {type(source).__name__}", "a path, an archive member or an array", "give one")
    refuse_device(source)
    if not source.is_file():
        raise DataError("", "no such file" if not source.is_dir() else "is a folder", "an image file", "check the list and the folder")
    if source.stat().st_size == 0:
        raise DataError("", "the file is empty", ACCEPTED, "copy or export it again")
    if source.stat().st_size > MOST_BYTES:
        raise DataError("", f"a file of {source.stat().st_size:,} bytes", f"at most {MOST_BYTES:,}", "cut or shrink the image")
    return source.read_bytes()


def _pillow_pixels(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise DataError("", f"{image.width} x {image.height} pixels", f"at most {MOST_PIXELS:,}", "cut or shrink the image")
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise DataError("", f"{frames} frames in one file", "one frame per file", "save the frame that is meant")
        image.load()
        return _eight_bit(ImageOps.exif_transpose(image))


def _eight_bit(image: Image.Image) -> Pixels:
    if image.mode.startswith(("I", "F")):
        return pixels_of_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _over_black(image.convert("RGBA"))
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def _over_black(image: Image.Image) -> Image.Image:
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


def _dicom_pixels(content: bytes) -> Pixels:
    pydicom = require("pydicom", "reading DICOM images")

    try:
        check_deflated(content, "")
        dataset = pydicom.dcmread(io.BytesIO(content))
        if int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) > MOST_PIXELS:
            raise DataError("", f"{dataset.Rows} x {dataset.Columns} pixels", f"at most {MOST_PIXELS:,}", "cut or shrink the image")
        check_codestream(dataset, "")
        return _of_dataset(dataset, dataset if is_deflated(content) else io.BytesIO(content))  # pydicom finds no pixels in deflated bytes
    except (DataError, *_BROKEN):
        raise
    except Exception as error:  # pydicom's own errors on broken content share no parent
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _of_dataset(data: Any, stream: Any) -> Pixels:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    if int(data.get("NumberOfFrames", 1) or 1) > 1:
        raise DataError("", f"{data.NumberOfFrames} frames in one DICOM file", "one frame", "export the frame that is meant")
    if "PixelData" not in data:
        raise DataError("", "a DICOM file without pixels", "an image object", "leave it out")
    values = pixel_array(stream, raw=False)
    photometric = str(data.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        return pixels_of_array(values if values.dtype == np.uint8 else windowed(values, low=0, high=2 ** int(data.BitsStored) - 1))
    stored = values
    values = apply_modality_lut(values, data)
    if data.get("VOILUTSequence"):
        depth = int(data.VOILUTSequence[0].LUTDescriptor[2])
        eight = windowed(apply_voi_lut(values, data, prefer_lut=True), low=0, high=2**depth - 1)
    else:
        eight = windowed(values, **_window(data), valid=_not_padding(stored, data))
    return pixels_of_array(255 - eight if photometric == "MONOCHROME1" else eight)


def _window(data: Any) -> dict[str, float]:
    """Lower and upper end of the first window of a DICOM file; empty without one."""

    def first(value: Any) -> float:
        return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)

    if data.get("WindowCenter") in (None, "") or data.get("WindowWidth") in (None, ""):
        return {}
    center, width = first(data.WindowCenter), first(data.WindowWidth)
    if str(data.get("VOILUTFunction", "LINEAR")) == "LINEAR_EXACT":
        return {"low": center - width / 2, "high": center + width / 2} if width > 0 else {}
    # PS3.3 C.11.2.1.2: the linear function shifts the centre by 0.5 and narrows the width by 1.
    return {"low": center - 0.5 - (width - 1) / 2, "high": center - 0.5 + (width - 1) / 2} if width > 1 else {}


def _not_padding(stored: NDArray[Any], data: Any) -> NDArray[np.bool_] | None:
    padding = data.get("PixelPaddingValue")
    if padding is None:
        return None
    limit = data.get("PixelPaddingRangeLimit", padding)
    low, high = sorted((int(padding), int(limit)))
    return np.asarray((stored < low) | (stored > high))
