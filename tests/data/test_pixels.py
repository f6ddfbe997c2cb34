"""Pixels of every kind of file, against values worked out by hand."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.data.images.imageset import ImageItem
from medlore.data.images.pixels import check_pixels, load_many, load_pixels, pixels_of_array, windowed
from medlore.errors import DataError


def item(path: Path) -> ImageItem:
    return ImageItem(path.name, path, ())


def saved(path: Path, image: Image.Image, **options: object) -> ImageItem:
    image.save(path, **options)
    return item(path)


def test_grey_bilevel_and_colour(tmp_path: Path) -> None:
    assert load_pixels(saved(tmp_path / "g.png", Image.new("L", (3, 2), 9))).tolist() == [[[9, 9, 9]] * 3] * 2
    assert load_pixels(saved(tmp_path / "b.png", Image.new("1", (2, 1), 1)))[0, 0].tolist() == [255] * 3
    assert load_pixels(saved(tmp_path / "c.bmp", Image.new("RGB", (2, 1), (1, 2, 3))))[0, 0].tolist() == [1, 2, 3]


def test_alpha_and_palette_lie_over_black(tmp_path: Path) -> None:
    half = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert load_pixels(saved(tmp_path / "a.png", half))[0, 0].tolist() == [100, 50, 0]
    assert load_pixels(saved(tmp_path / "la.png", Image.new("LA", (1, 1), (200, 0))))[0, 0].tolist() == [0, 0, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert load_pixels(saved(tmp_path / "p.gif", palette))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    palette.info["transparency"] = 1
    palette.save(tmp_path / "pt.png", transparency=1)
    assert load_pixels(item(tmp_path / "pt.png"))[0].tolist() == [[10, 20, 30], [0, 0, 0]]


def test_cmyk(tmp_path: Path) -> None:
    pixel = load_pixels(saved(tmp_path / "c.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))[4, 4]
    assert pixel[0] > 240
    assert max(pixel[1:]) < 15


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned: the camera's right is up
    found = load_pixels(saved(tmp_path / "e.png", image, exif=exif))[..., 0]
    assert found.tolist() == [[40, 10], [50, 20], [60, 30]]


def test_sixteen_bits_are_windowed_by_percentiles(tmp_path: Path) -> None:
    values = np.linspace(1000, 3000, 10_000).astype(np.uint16).reshape(100, 100)
    values[0, 0], values[-1, -1] = 0, 65535  # outliers must not set the window
    found = load_pixels(saved(tmp_path / "s.png", Image.fromarray(values)))[..., 0]
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.clip(np.floor((values - low) / (high - low) * 255 + 1e-6), 0, 255)
    assert np.array_equal(found, expected)
    assert (found.min(), found.max()) == (0, 255)
    assert abs(int(found[50, 0]) - 128) <= 2
    floats = load_pixels(saved(tmp_path / "f.tiff", Image.fromarray(values.astype(np.float32))))[..., 0]
    assert np.array_equal(floats, found)


def test_arrays_of_any_number_type() -> None:
    assert pixels_of_array(np.full((2, 2), 7, np.uint16)).max() == 0, "a constant image is black"
    assert windowed(np.array([[True, False]])).tolist() == [[255, 0]]
    holes = np.array([[np.nan, 0.0], [1.0, np.inf]])
    assert windowed(holes).tolist() == [[0, 0], [255, 0]]
    assert windowed(np.array([-5, 0, 50, 100, 500]), low=0, high=100).tolist() == [0, 0, 127, 255, 255]
    rgba = np.zeros((1, 1, 4), np.uint8)
    rgba[0, 0] = (200, 100, 0, 128)
    assert pixels_of_array(rgba)[0, 0].tolist() == [100, 50, 0]
    assert pixels_of_array(np.zeros((2, 3, 1), np.uint8)).shape == (2, 3, 3)
    assert pixels_of_array(np.zeros((2, 3), np.uint8)).flags["C_CONTIGUOUS"]


def broken_files(folder: Path) -> list[ImageItem]:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format="JPEG" if name.endswith("jpg") else "PNG")
        (folder / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "frames.gif").write_bytes(b"")
    Image.fromarray(noise).save(folder / "frames.gif", save_all=True, append_images=[Image.fromarray(255 - noise)])
    (folder / "folder.png").mkdir()
    return [item(folder / n) for n in ("cut.jpg", "cut.png", "text.png", "empty.png", "frames.gif", "folder.png", "absent.png")]


def test_every_broken_file_is_named_at_once(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.png", Image.new("L", (3, 3)))
    items = [good, *broken_files(tmp_path), good]
    with pytest.raises(DataError, match="7 of 9 cannot be read") as caught:
        load_many(items)
    assert len(caught.value.faults) == 7
    assert check_pixels(items) == list(caught.value.faults)
    for words in (
        "cut.jpg: cannot be read",
        "cut.png: cannot be read",
        "text.png: cannot be read as an image (no format that is known here)",
        "the file is empty",
        "2 frames",
        "is a folder",
        "no such file",
    ):
        assert words in str(caught.value)
    assert "BytesIO" not in str(caught.value)
    with pytest.raises(DataError, match=r"text\.png"):
        load_many([good, items[3]])
    assert len(load_many([good, good])) == 2


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlore.data.images.pixels.MOST_PIXELS", 100)
    with pytest.raises(DataError, match="11 x 10 pixels"):
        load_pixels(saved(tmp_path / "b.png", Image.new("L", (11, 10))))


def test_a_header_that_claims_a_giant_image(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "giant.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(DataError, match=r"giant\.png"):
        load_pixels(item(tmp_path / "giant.png"))


# ---- DICOM


def dicom(path: Path, values: np.ndarray, **tags: object) -> ImageItem:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = values.shape[-2:] if values.ndim == 2 or tags.get("NumberOfFrames") else values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = values.dtype.itemsize * 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return item(path)


RAMP = np.array([[0, 100, 200, 300, 1000]], np.int16).repeat(2, 0)


def test_dicom_rescale_then_window(tmp_path: Path) -> None:
    found = load_pixels(
        dicom(tmp_path / "w.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[100.5, 7], WindowWidth=[401, 7])
    )
    # stored 0 100 200 300 1000 -> -100 100 300 500 1900; window -100 .. 300
    assert found[0, :, 0].tolist() == [0, 127, 255, 255, 255]


def test_dicom_exact_window_and_monochrome1(tmp_path: Path) -> None:
    tags = {"WindowCenter": 100, "WindowWidth": 200, "VOILUTFunction": "LINEAR_EXACT"}
    plain = load_pixels(dicom(tmp_path / "e.dcm", RAMP, **tags))[0, :, 0]
    assert plain.tolist() == [0, 127, 255, 255, 255]
    turned = load_pixels(dicom(tmp_path / "m.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", **tags))[0, :, 0]
    assert turned.tolist() == [255, 128, 0, 0, 0]


def test_dicom_without_window_leaves_padding_out(tmp_path: Path) -> None:
    values = np.tile(np.arange(100, 200, dtype=np.int16), (100, 1))
    values[:50] = -2000
    padded = load_pixels(dicom(tmp_path / "p.dcm", values, PixelPaddingValue=-2000))[..., 0]
    assert (padded[0, 0], padded[60, 0], padded[60, 99]) == (0, 0, 255)
    assert abs(int(padded[60, 50]) - 128) < 5
    plain = load_pixels(dicom(tmp_path / "q.dcm", values))[..., 0]
    assert plain[60, 0] > 230, "without the tag the padding belongs to the window"


def test_dicom_lookup_table(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], np.array([0, 30000, 10000, 60000], np.uint16).tobytes()
    values = np.array([[0, 1, 2, 3]], np.uint16).repeat(2, 0)
    found = load_pixels(dicom(tmp_path / "l.dcm", values, VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2))[0, :, 0]
    assert found.tolist() == [0, 116, 38, 233], "shares of 65535, the range of the table"


def test_dicom_colour_and_refusals(tmp_path: Path) -> None:
    colour = np.zeros((2, 2, 3), np.uint8)
    colour[..., 0] = 250
    found = load_pixels(dicom(tmp_path / "c.dcm", colour, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB"))
    assert found[1, 1].tolist() == [250, 0, 0]
    frames = np.zeros((3, 2, 2), np.uint8)
    with pytest.raises(DataError, match="3 frames in one DICOM"):
        load_pixels(dicom(tmp_path / "f.dcm", frames, NumberOfFrames=3))
    whole = dicom(tmp_path / "t.dcm", RAMP)
    content = (tmp_path / "t.dcm").read_bytes()
    (tmp_path / "t.dcm").write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"t\.dcm: cannot be read as an image"):
        load_pixels(whole)
    (tmp_path / "noname").write_bytes(content)
    assert load_pixels(item(tmp_path / "noname")).shape == (2, 5, 3), "known by its content, not by its name"


def test_random_damage_is_always_a_data_error(tmp_path: Path) -> None:
    """Flipped and cut bytes in every format: an image, or one clear message; never anything else."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "bmp", "tiff", "gif", "webp", "ppm"):
        image.save(tmp_path / f"whole.{suffix}")
    dicom(tmp_path / "whole.dcm", RAMP, WindowCenter=3, WindowWidth=7, RescaleSlope=1, RescaleIntercept=2)
    refused = []
    for path in sorted(tmp_path.glob("whole.*")):
        for number in range(40):
            content = bytearray(path.read_bytes())
            for _ in range(4):
                content[generator.integers(0, min(len(content), 600))] = generator.integers(0, 256)
            damaged = tmp_path / f"damaged{path.suffix}"
            damaged.write_bytes(bytes(content[: generator.integers(0, len(content))] if number % 3 == 0 else content))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert load_pixels(item(damaged)).dtype == np.uint8
                except DataError as error:
                    refused.append(str(error).startswith(f"{damaged}: "))
    assert 50 < len(refused) < 320
    assert all(refused)
