"""NIfTI files: what comes in odd is handled with a note or refused with a reason; what goes out lies on the same grid."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medlore.data.volumes.label_tables import read_label_table
from medlore.data.volumes.nifti import check_same_grid, copy_image, read_grid, read_nifti, write_nifti
from medlore.errors import DataError, StepError


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **fields: object) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([-0.8, 0.8, 2.5, 1]) if affine is None else affine), path)
    if fields:  # written into the bytes, since nibabel would not write such headers
        content = bytearray(path.read_bytes())
        header = nib.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        content[:348] = header.binaryblock
        path.write_bytes(content)
    return path


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (7, 6, 5)).astype(np.int16)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_and_affine_are_nibabels(tmp_path: Path, kind: type, suffix: str) -> None:
    values = np.random.default_rng(1).integers(0, 200, (7, 6, 5)).astype(kind)
    volume = read_nifti(save(tmp_path / f"a{suffix}", values))
    assert np.array_equal(volume.array, values)
    assert volume.array.dtype == kind
    assert np.array_equal(volume.affine, np.diag([-0.8, 0.8, 2.5, 1]).astype(np.float32))
    assert read_grid(tmp_path / f"a{suffix}")[0] == (7, 6, 5)


def test_compression_is_recognised_by_the_content_not_the_name(tmp_path: Path, array: np.ndarray) -> None:
    save(tmp_path / "a.nii.gz", array)
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii.gz").read_bytes())
    assert np.array_equal(read_nifti(tmp_path / "b.nii").array, array)


def test_big_endian_and_nifti2(tmp_path: Path, array: np.ndarray) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(array.astype(">i2"), np.eye(4), header), tmp_path / "big.nii.gz")
    nib.save(nib.Nifti2Image(array, np.eye(4)), tmp_path / "two.nii.gz")
    for name in ("big.nii.gz", "two.nii.gz"):
        volume = read_nifti(tmp_path / name)
        assert np.array_equal(volume.array, array)
        assert volume.array.dtype.isnative
        write_nifti(tmp_path / "out.nii.gz", (volume.array > 0).astype(np.uint8), volume)
        assert np.array_equal(np.asanyarray(nib.load(tmp_path / "out.nii.gz").dataobj), array > 0)


def test_slope_and_intercept_are_applied(tmp_path: Path, array: np.ndarray) -> None:
    path = save(tmp_path / "a.nii", array)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([2.0, -1024.0], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    assert np.allclose(read_nifti(path).array, array.astype(float) * 2 - 1024)
    assert np.allclose(read_nifti(path).array, nib.load(path).get_fdata())


def test_masks_keep_sform_qform_codes_and_shape(tmp_path: Path, array: np.ndarray) -> None:
    affine = np.array([[-0.8, 0.1, 0.2, 10], [0.1, 0.79, -0.3, -20], [0.05, 0.2, 2.4, 33], [0, 0, 0, 1]])
    image = nib.Nifti1Image(array[..., None], affine)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a scan"
    nib.save(image, tmp_path / "in.nii.gz")
    volume = read_nifti(tmp_path / "in.nii.gz")
    out = write_nifti(tmp_path / "mask.nii.gz", array > 0, volume, labels={1: "liver", 2: "größe"})
    mask, source = nib.load(out), nib.load(tmp_path / "in.nii.gz")
    assert mask.shape == source.shape == (7, 6, 5, 1)
    for name in ("get_sform", "get_qform"):
        (got, code), (want, wanted) = getattr(mask, name)(coded=True), getattr(source, name)(coded=True)
        assert code == wanted
        assert np.array_equal(got, want)
    assert np.array_equal(mask.affine, source.affine)
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    assert bytes(mask.header["descrip"]).rstrip(b"\0") == b"a scan"
    assert mask.get_data_dtype() == np.uint8
    assert np.array_equal(np.asanyarray(mask.dataobj)[..., 0], array > 0)
    assert read_label_table(out) == {1: "liver", 2: "größe"}


def test_the_self_check_finds_another_grid(tmp_path: Path, array: np.ndarray) -> None:
    volume = read_nifti(save(tmp_path / "a.nii.gz", array))
    save(tmp_path / "moved.nii.gz", array, np.diag([-0.8, 0.8, 2.6, 1]))
    with pytest.raises(StepError, match="another grid"):
        check_same_grid(tmp_path / "moved.nii.gz", volume)


def test_sform_and_qform_that_disagree(tmp_path: Path, array: np.ndarray) -> None:
    image = nib.Nifti1Image(array, np.eye(4))
    image.set_sform(np.diag([1.0, 1, 1, 1]), code=1)
    moved = np.eye(4)
    moved[0, 3] = 5
    image.set_qform(moved, code=1)
    nib.save(image, tmp_path / "moved.nii")
    volume = read_nifti(tmp_path / "moved.nii")
    assert "5.00 mm apart; the sform was taken" in volume.notes[0]
    assert read_nifti(tmp_path / "moved.nii", affine_from="qform").affine[0, 3] == 5
    image.set_qform(np.diag([-1.0, 1, 1, 1]), code=1)
    nib.save(image, tmp_path / "mirrored.nii")
    with pytest.raises(DataError, match=r"RAS against LAS.*--affine sform"):
        read_nifti(tmp_path / "mirrored.nii")
    assert read_nifti(tmp_path / "mirrored.nii", affine_from="sform").affine[0, 0] == 1


def test_a_file_without_orientation_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    path = save(tmp_path / "a.nii", array, sform_code=0, qform_code=0)
    with pytest.raises(DataError, match="left and right are not known"):
        read_nifti(path)


def test_4d_and_5d(tmp_path: Path, array: np.ndarray) -> None:
    path = save(tmp_path / "four.nii", np.stack([array, array + 1], axis=-1))
    with pytest.raises(DataError, match=r'4D, 2 volumes.*"frame": 0 to 1'):
        read_nifti(path)
    assert np.array_equal(read_nifti(path, frame=1).array, array + 1)
    with pytest.raises(DataError, match="frame 2 was asked for"):
        read_nifti(path, frame=2)
    with pytest.raises(DataError, match="5D"):
        read_nifti(save(tmp_path / "five.nii", np.stack([array] * 3, axis=-1)[:, :, :, None]))
    assert read_nifti(save(tmp_path / "one.nii", array[..., None, None])).array.shape == (7, 6, 5)


def test_a_flat_image_is_a_volume_of_one_slice(tmp_path: Path, array: np.ndarray) -> None:
    volume = read_nifti(save(tmp_path / "flat.nii.gz", array[:, :, 0]))
    assert volume.array.shape == (7, 6, 1)
    assert nib.load(write_nifti(tmp_path / "mask.nii.gz", volume.array > 0, volume)).shape == (7, 6)


def test_damaged_files_say_what_is_wrong(tmp_path: Path, array: np.ndarray) -> None:
    whole = save(tmp_path / "a.nii.gz", array).read_bytes()
    plain = save(tmp_path / "a.nii", array).read_bytes()
    text = b"patient,age\n1,2\n" * 60
    cases = {
        "cut.nii.gz": (whole[: len(whole) // 2], "damaged or cut-off"),
        "cut.nii": (plain[:-9], "ends after"),
        "text.nii": (text, "a text file"),
        "text.nii.gz": (gzip.compress(text), "a text file"),
        "empty.nii": (b"", "not NIfTI"),
        "zip.nii.gz": (b"\x1f\x8b" + b"\0" * 40, "damaged or cut-off"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_nifti(tmp_path / name)


def test_absurd_headers_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    flat = np.diag([1.0, 1, 1, 1])
    for scale, message in ((0.0, "voxel edges of 0"), (1e5, "voxel edges"), (np.nan, "not 4x4 and finite")):
        path = save(tmp_path / "a.nii", array, flat, qform_code=0, srow_x=[scale, 0, 0, 0], sform_code=1)
        with pytest.raises(DataError, match=message):
            read_nifti(path)
    content = bytearray(save(tmp_path / "b.nii", array).read_bytes())
    content[42:44] = np.array([0], "<i2").tobytes()  # dim[1]
    (tmp_path / "b.nii").write_bytes(content)
    with pytest.raises(DataError, match="empty volume"):
        read_nifti(tmp_path / "b.nii")
    with pytest.raises(DataError, match="one real number"):
        read_nifti(save(tmp_path / "c.nii", array.astype(np.complex64)))


def test_headers_that_promise_too_much_are_refused_before_memory_is_taken(tmp_path: Path, array: np.ndarray) -> None:
    huge = [3, 32000, 32000, 32000, 1, 1, 1, 1]  # 65 TB
    whole = save(tmp_path / "a.nii", array, dim=huge).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(whole))
    for name, message in (("a.nii", "ends after"), ("a.nii.gz", "a header that promises 65,536,000,000,352 bytes")):
        for read in (read_nifti, read_grid):
            with pytest.raises(DataError, match=message):
                read(tmp_path / name)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(save(tmp_path / "b.nii", array, vox_offset=1e12).read_bytes()))
    with pytest.raises(DataError, match="begin at byte"):
        read_nifti(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii.gz").write_bytes(b"\x1f\x8b" + b"\0" * 40)
    with pytest.raises(DataError, match="damaged or cut-off"):
        read_grid(tmp_path / "c.nii.gz")


def test_a_copied_image_says_no_more_than_grid_and_voxels(tmp_path: Path, array: np.ndarray) -> None:
    plain = read_nifti(save(tmp_path / "plain.nii.gz", array))
    assert copy_image(plain, tmp_path / "copy.nii.gz").read_bytes() == (tmp_path / "plain.nii.gz").read_bytes()
    image = nib.Nifti1Image(array, np.diag([-0.8, 0.8, 2.5, 1]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, 1.1.1970"))
    image.header["descrip"] = b"kept"
    nib.save(image, tmp_path / "extended.nii.gz")
    image.header.extensions.clear()
    image.header["db_name"] = b"Jane Doe"
    nib.save(image, tmp_path / "named.nii.gz")
    for name in ("extended", "named"):
        copied = nib.load(copy_image(read_nifti(tmp_path / f"{name}.nii.gz"), tmp_path / "copy.nii.gz"))
        assert b"Jane" not in gzip.decompress((tmp_path / "copy.nii.gz").read_bytes())
        assert np.array_equal(np.asanyarray(copied.dataobj), array)
        assert np.allclose(copied.affine, image.affine)
        assert bytes(copied.header["descrip"]).strip(b"\0") == b"kept"
        mask = write_nifti(tmp_path / "mask.nii.gz", array > 0, read_nifti(tmp_path / f"{name}.nii.gz"))
        assert b"Jane" not in gzip.decompress(mask.read_bytes())


ODD = {
    "sct/t2_t2.nii.gz": "PSR", "sct/t2s_t2s.nii.gz": "LAS", "sct/mt_mt1.nii.gz": "LAS", "totalseg/example_mr_sm.nii.gz": "LPS",
    "niivue/CT_pitch.nii.gz": "RAS", "niivue/fmri_pitch.nii.gz": "RAS", "sct/mt_mtr.nii.gz": "LAS",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_real_odd_files_return_to_their_own_grid(shared_data: Path, tmp_path: Path, name: str) -> None:
    from medlore.data.volumes.geometry import orientation_of

    volume, source = read_nifti(shared_data / name), nib.load(shared_data / name)
    assert orientation_of(volume.affine) == ODD[name]
    assert np.allclose(volume.array, np.asanyarray(source.dataobj), rtol=1e-6, equal_nan=True)
    mask = nib.load(write_nifti(tmp_path / "m.nii.gz", volume.array > 0, volume))
    assert np.array_equal(mask.affine, source.affine)
    assert np.array_equal(np.asanyarray(mask.dataobj) > 0, np.asanyarray(source.dataobj) > 0)


@pytest.mark.parametrize(("name", "reason"), [("sct/dmri_dmri", "4D, 7"), ("sct/mt_warp_template2mt", "5D"), ("niivue/pcasl", "4D, 10")])
def test_real_series_and_fields_are_refused(shared_data: Path, name: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_nifti(shared_data / f"{name}.nii.gz")
