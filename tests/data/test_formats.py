"""The table of volume formats: one object brings a format to the command line; what the table says holds for every format."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medlore.data import formats
from medlore.data.formats import (
    FORMATS,
    ReadOptions,
    VolumeFormat,
    files_of_masks,
    find_images,
    format_of,
    read_grid,
    stem_of,
    write_volume,
)
from medlore.data.volumes.cases import Case
from medlore.data.volumes.masks import read_masks
from medlore.data.volumes.nifti import Volume, header_for, read_nifti
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, InputError

ARRAY = np.random.default_rng(0).integers(0, 900, (7, 6, 5)).astype(np.int16)
AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])


def toy_format() -> VolumeFormat:
    """Three sizes, three spacings, then 16-bit numbers; nothing else in the project knows of it."""

    def read(path: Path, options: ReadOptions) -> Volume:
        content = path.read_bytes()
        shape = struct.unpack_from("<3i", content, 4)
        affine = np.diag([*struct.unpack_from("<3f", content, 16), 1.0])
        array = np.frombuffer(content, "<i2", offset=28).reshape(shape, order="F")
        return Volume(array, affine, header_for(affine, shape), shape, path)

    return VolumeFormat("Toy", (".toy",), read, recognised_by=lambda head: head.startswith(b"TOY!"))


def save_toy(path: Path, array: np.ndarray[Any, Any], spacing: tuple[float, float, float]) -> Path:
    path.write_bytes(b"TOY!" + struct.pack("<3i3f", *array.shape, *spacing) + array.astype("<i2").tobytes(order="F"))
    return path


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, toy_format()))


@pytest.mark.usefixtures("with_toy")
def test_one_object_brings_a_format_to_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medlore.cli import main

    rng = np.random.default_rng(0)
    image = rng.integers(0, 300, (40, 44, 36))
    save_toy(tmp_path / "scan.toy", image, (1, 1, 1))
    assert main(["info", str(tmp_path / "scan.toy"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["shape"], facts["values"]["largest"]) == ("volume", [40, 44, 36], float(image.max()))
    options = ["--labels", "hippocampus", "--modality", "t1", "--model", "medlore:seg-mini", "--no-picture"]
    assert main(["segment", str(tmp_path), *options, "--out", str(tmp_path / "out")]) == 0
    mask = nib.load(tmp_path / "out" / "scan" / "hippocampus.nii.gz")  # the suffix is no part of the name
    assert mask.shape == image.shape
    save_toy(tmp_path / "mask.toy", np.asanyarray(mask.dataobj), (1, 1, 1))
    line = {"image": "scan.toy", "label": ["hippocampus"], "modality": "t1", "mask": "mask.toy"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line))
    capsys.readouterr()
    assert main(["evaluate", "--pred", str(tmp_path / "out"), "--truth", str(tmp_path / "cases.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"]["dice"] == 1.0


def save_as(folder: Path, suffix: str, array: np.ndarray[Any, Any], stem: str = "a") -> Path:
    """By libraries that are not ours."""
    path = folder / f"{stem}{suffix}"
    if suffix in (".nii", ".nii.gz"):
        nib.save(nib.Nifti1Image(array, AFFINE), path)
    elif suffix in (".mgz", ".mgh"):
        nib.save(nib.MGHImage(array, AFFINE), path)
    else:
        image = SimpleITK.GetImageFromArray(array.T)
        image.SetSpacing((0.8, 0.8, 2.5))
        SimpleITK.WriteImage(image, str(path), useCompression=suffix == ".mha")
    return path


SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".nhdr", ".seg.nrrd", ".mha", ".mhd", ".mgz", ".mgh"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read_found_measured_and_taken_as_a_mask(tmp_path: Path, suffix: str) -> None:
    codes = (ARRAY % 3).astype(np.uint8)
    save_as(tmp_path, ".nii.gz", ARRAY, "image")
    (tmp_path / "m").mkdir()
    path = save_as(tmp_path / "m", suffix, codes)
    volume = read_volume(path)
    assert np.array_equal(volume.array, codes)
    assert np.allclose(volume.affine, AFFINE, atol=1e-6)
    assert find_images(tmp_path / "m") == [path]
    assert list(files_of_masks(tmp_path / "m").items()) == [("a", path)] or suffix in (".nhdr", ".mhd")
    shape, affine = read_grid(path)
    assert shape == codes.shape
    assert np.array_equal(affine, volume.affine)
    assert stem_of(path.name) == Case(path, (), "ct").name == "a"
    image = read_nifti(tmp_path / "image.nii.gz")
    found = read_masks(Case(image.path, ("one", "two"), "mri", mask=path), image)
    assert np.array_equal(found.mask("two"), codes == 2)
    with pytest.raises(DataError, match="at most 10 bytes"):
        read_volume(path, most_bytes=10)
    assert np.array_equal(read_volume(path, frame=0).array, codes)
    with pytest.raises(DataError, match="one volume, of which frame 3"):
        read_volume(path, frame=3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_content_tells_the_format_not_the_name(tmp_path: Path, suffix: str) -> None:
    path = save_as(tmp_path, suffix, ARRAY)
    other = path.rename(tmp_path / "image.nii.gz")
    assert format_of(other).name == formats.format_named_like(path.name).name
    assert np.array_equal(read_volume(other).array, ARRAY)


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "an empty file"), (b"some words\n", "a text file"), (bytes(range(256)), "something else")]
)
def test_what_is_no_volume_is_refused_with_what_would_be(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.xyz").write_bytes(content)
    with pytest.raises(DataError, match=rf"no volume: {what}.*NIfTI \(\.nii\.gz, \.nii\).*FreeSurfer"):
        read_volume(tmp_path / "a.xyz")
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix}").write_bytes(content)
        with pytest.raises(DataError, match=f"a{suffix}"):
            read_volume(tmp_path / f"a{suffix}")


def test_writing_asks_the_table_too(tmp_path: Path) -> None:
    like = Volume(ARRAY, AFFINE, header_for(AFFINE, ARRAY.shape), ARRAY.shape, tmp_path)
    assert np.array_equal(read_volume(write_volume(tmp_path / "a.nii", ARRAY, like)).array, ARRAY)
    with pytest.raises(InputError, match=r"a suffix of no format that is written.*\.nii\.gz, \.nii"):
        write_volume(tmp_path / "a.mgz", ARRAY, like)


def test_no_other_module_lists_suffixes_of_volumes() -> None:
    """A second list would disagree with the table one day, as seven did before."""
    import ast

    known = {suffix for format_ in FORMATS for suffix in format_.suffixes} - {".zip", ".dcm", ".npy"}
    source = Path(formats.__file__).parents[1]
    for path in sorted(source.rglob("*.py")):
        if path == Path(formats.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                held = {item.value for item in node.elts if isinstance(item, ast.Constant)} & known
                assert not held, f"{path.relative_to(source)}:{node.lineno} lists {sorted(held)}"


# -- MetaImage and MGH, against libraries that are not ours ------------------------------------------------------------


def rotated(image: SimpleITK.Image) -> SimpleITK.Image:
    from scipy.spatial.transform import Rotation

    image.SetSpacing((0.7, 0.9, 2.2))
    image.SetOrigin((10.5, -20.25, 30))
    image.SetDirection(Rotation.from_euler("xyz", (20, -30, 40), degrees=True).as_matrix().ravel().tolist())
    return image


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64])
@pytest.mark.parametrize(
    ("suffix", "packed"), [(".mha", True), (".mha", False), (".mhd", True), (".mhd", False), (".nrrd", True), (".nhdr", False)]
)
def test_what_simpleitk_writes_is_what_is_read(tmp_path: Path, kind: type, suffix: str, packed: bool) -> None:
    values = np.random.default_rng(0).integers(0, 120, (5, 6, 7)).astype(kind)
    image = rotated(SimpleITK.GetImageFromArray(values))
    SimpleITK.WriteImage(image, str(tmp_path / f"a{suffix}"), useCompression=packed)
    volume = read_volume(tmp_path / f"a{suffix}")
    assert np.array_equal(volume.array, values.T)
    assert volume.array.dtype == kind
    for index in ((0, 0, 0), (6, 5, 4), (3, 0, 2)):
        place = (volume.affine @ [*index, 1])[:3]
        assert np.allclose(place, np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1), atol=1e-4)


HEAD = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\n{more}TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\n"
    "ElementSpacing = 1 1 2\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = {file}\n"
)
PLAIN = np.arange(120, dtype="<i2").reshape(6, 5, 4)


@pytest.mark.parametrize(
    ("more", "file", "lead", "order"),
    [
        ("", "LOCAL", b"", "<"),
        ("HeaderSize = 7\n", "v.raw", b"1234567", "<"),
        ("HeaderSize = -1\n", "v.raw", b"12345678901", "<"),
        ("BinaryDataByteOrderMSB = True\n", "LOCAL", b"", ">"),
        ("ElementByteOrderMSB = True\n", "v.raw", b"", ">"),
        ("BinaryDataByteOrderMSB = False\n", "v.raw", b"", "<"),
        ("Comment = a = b\n", "LOCAL", b"", "<"),
    ],
)
def test_metaimage_fields_mean_what_simpleitk_takes_them_for(tmp_path: Path, more: str, file: str, lead: bytes, order: str) -> None:
    body = lead + PLAIN.astype(f"{order}i2").tobytes(order="F")
    path = tmp_path / "a.mhd"
    path.write_bytes(HEAD.format(more=more, file=file).encode() + (body if file == "LOCAL" else b""))
    if file != "LOCAL":
        (tmp_path / file).write_bytes(body)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, PLAIN)
    assert np.array_equal(read_volume(path).array, PLAIN)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("NDims = 3", "NDims = 2", "of 2 axes"),
        ("ElementSpacing = 1 1 2\n", "", "ElementSpacing = ''"),
        ("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "", "TransformMatrix = ''"),
        ("Offset = 1 2 3", "Offset = 1 2 nan", "Offset = '1 2 nan'"),
        ("DimSize = 6 5 4", "DimSize = 6 5 x", "DimSize"),
        ("DimSize = 6 5 4", "DimSize = 6 -5 4", "an empty volume"),
        ("DimSize = 6 5 4", "DimSize = 60000 50000 40000", "ends after"),
        ("MET_SHORT", "MET_SHORT_ARRAY", "ElementType"),
        ("BinaryData = True", "BinaryData = False", "voxels in letters"),
        ("= LOCAL", "= LIST", "several files"),
        ("= LOCAL", "= v%d.raw 1 4 1", "several files"),
        ("= LOCAL", "= ../other/v.raw", "in another folder"),
        ("= LOCAL", "= /etc/passwd", "in another folder"),
        ("= LOCAL", "= gone.raw", "is not there"),
        ("NDims = 3", "NDims = 3\nNDims = 3", "twice"),
        ("ElementType", "ElementNumberOfChannels = 3\nElementType", "of 3 channels"),
        ("ElementDataFile = LOCAL", "", "the field name"),
        ("NDims = 3", "NDims = 3\nCompressedData = True", "damaged or cut-off"),
    ],
)
def test_metaimage_that_cannot_be_read_says_why(tmp_path: Path, old: str, new: str, reason: str) -> None:
    text = HEAD.format(more="", file="LOCAL")
    assert old in text
    (tmp_path / "a.mha").write_bytes(text.replace(old, new).encode() + PLAIN.tobytes(order="F"))
    with pytest.raises(DataError, match=reason):
        read_volume(tmp_path / "a.mha")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
def test_freesurfer_is_what_nibabel_reads(tmp_path: Path, kind: type, suffix: str) -> None:
    affine = np.array([[-0.8, 0.1, 0.2, 10], [0.1, 0.79, -0.3, -20], [0.05, 0.2, 2.4, 33], [0, 0, 0, 1]])
    image = nib.MGHImage(ARRAY.astype(kind), affine)
    nib.save(image, tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    source = nib.MGHImage.from_bytes(gzip.decompress(content) if suffix == ".mgz" else content)
    volume = read_volume(tmp_path / f"a{suffix}")
    assert np.array_equal(volume.array, np.asanyarray(source.dataobj))
    assert np.allclose(volume.affine, source.affine, atol=1e-6)


def test_freesurfer_frames_and_what_has_no_sides(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(np.stack([ARRAY, ARRAY + 1], axis=-1), AFFINE), tmp_path / "a.mgz")
    assert np.array_equal(read_volume(tmp_path / "a.mgz", frame=1).array, ARRAY + 1)
    with pytest.raises(DataError, match="4D, 2 volumes"):
        read_volume(tmp_path / "a.mgz")
    nib.save(nib.MGHImage(ARRAY, AFFINE), tmp_path / "b.mgh")
    content = bytearray((tmp_path / "b.mgh").read_bytes())
    content[28:30] = b"\0\0"  # goodRASFlag
    (tmp_path / "b.mgh").write_bytes(content)
    with pytest.raises(DataError, match="left and right are not known"):
        read_volume(tmp_path / "b.mgh")
    (tmp_path / "c.mgh").write_bytes(bytes(content[:200]))
    with pytest.raises(DataError, match="not MGH"):
        read_volume(tmp_path / "c.mgh")
