"""The one table of formats in which the masks of a case are written; `--format` names them.

A new format is one `MaskFormat` in `MASK_FORMATS`: the command line, the checks before a run, the folder of a case, its record, the
next run that looks for what is finished, and whoever offers results for download then know it. All are read back by
`medlore.data.formats.read_mask_file`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medlore.errors import InputError, UnknownNameError

if TYPE_CHECKING:  # settings name the formats: what writes them is imported when it writes
    from medlore.data.volumes.nifti import Volume
    from medlore.segmenting.case_masks import CaseMasks


@dataclass(frozen=True)
class MaskFormat:
    """One format of masks.

    Args:
        name: as `--format` calls it.
        title: for people.
        file: of the one file that holds all labels, in the folder of a case.
        write: writes a case into a folder.
        check: says before a network runs what a DICOM series lacks for it; None where it needs none.
        empty: whether it can hold a case without a voxel.
        each: whether every label has a file of its own beside it.
    """

    name: str
    title: str
    file: str
    write: Callable[[Path, CaseMasks], object]
    check: Callable[[Volume], None] | None = None
    empty: bool = True
    each: bool = False


def _nifti(folder: Path, case: CaseMasks) -> None:
    from medlore.segmenting.case_masks import write_nifti_masks

    write_nifti_masks(folder, case, NIFTI.file)


def _dicom_seg(folder: Path, case: CaseMasks) -> None:
    from medlore.data.volumes.dicom import write_dicom_seg

    write_dicom_seg(folder / DICOM_SEG.file, case.series, case.on_series(empty=False))


def _check_dicom_seg(series: Volume) -> None:
    from medlore.data.volumes.dicom import check_dicom_seg

    check_dicom_seg(series)


def _rtstruct(folder: Path, case: CaseMasks) -> None:
    from medlore.data.volumes.rtstruct import write_rtstruct

    write_rtstruct(folder / RTSTRUCT.file, case.series, case.on_series())


def _check_rtstruct(series: Volume) -> None:
    from medlore.data.volumes.rtstruct import check_rtstruct

    check_rtstruct(series)


def _seg_nrrd(folder: Path, case: CaseMasks) -> None:
    from medlore.data.volumes.seg_nrrd import write_seg_nrrd

    write_seg_nrrd(folder / SEG_NRRD.file, case.affine, case.shape, case.on_image())


NIFTI = MaskFormat("nifti", "NIfTI", "prediction.nii.gz", _nifti, each=True)
DICOM_SEG = MaskFormat("dicom-seg", "DICOM-SEG", "segmentation.dcm", _dicom_seg, _check_dicom_seg, empty=False)
RTSTRUCT = MaskFormat("rtstruct", "RTSTRUCT", "structures.dcm", _rtstruct, _check_rtstruct)
SEG_NRRD = MaskFormat("seg-nrrd", "Slicer's .seg.nrrd", "segmentation.seg.nrrd", _seg_nrrd)
MASK_FORMATS: dict[str, MaskFormat] = {made.name: made for made in (NIFTI, DICOM_SEG, RTSTRUCT, SEG_NRRD)}


def formats_named(names: Sequence[str]) -> list[MaskFormat]:
    """The formats of these names, in the order of the table: the first holds the masks, the others stand beside them."""
    return [made for name, made in MASK_FORMATS.items() if name in names]


def checked_formats(names: Sequence[str]) -> list[MaskFormat]:
    """The formats of these names, each of which has to be one.

    Raises:
        UnknownNameError: no such format; the nearest three are named.
        InputError: no name at all.
    """
    for name in names:
        if name not in MASK_FORMATS:
            raise UnknownNameError("formats", name, MASK_FORMATS)
    if not names:
        raise InputError("formats", "none were named", f"one or more of {', '.join(MASK_FORMATS)}", "name one")
    return formats_named(names)
