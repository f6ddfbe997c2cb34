"""Small DICOM series of the tests' own making: sound ones, and ones with any attribute changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

GONE = object()  # as the value of an attribute: taken out


def write_slices(
    folder: Path,
    array: np.ndarray[Any, Any],
    *,
    each: Callable[[Any, int], None] | None = None,
    mr: bool = False,
    seed: str | None = None,
    **tags: Any,
) -> Path:
    """One file a slice of an integer array (x y z), 1 mm apart; CT has the intercept -1024.

    Args:
        folder: made if need be.
        array: stored numbers.
        each: changes the data set of a slice (data set, z).
        mr: MR in place of CT.
        seed: the same UIDs at every call with the same one; new ones without.
        tags: attributes of all slices; `GONE` takes one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = MRImageStorage if mr else CTImageStorage

    def uid(name: str) -> str:
        return generate_uid(entropy_srcs=None if seed is None else [seed, name])

    series, study, frame = uid("series"), uid("study"), uid("frame")
    for z in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = kind, uid(str(z)), ExplicitVRLittleEndian
        d = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID = series, study, frame
        d.Modality, d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = ("MR" if mr else "CT"), "A^B", "0", "", ""
        d.StudyDate = d.StudyTime = d.AccessionNumber = d.ReferringPhysicianName = ""
        d.StudyID, d.SeriesNumber, d.InstanceNumber = "1", 1, z + 1
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = array.shape[1], array.shape[0], 1, "MONOCHROME2"
        d.BitsAllocated = d.BitsStored = array.dtype.itemsize * 8
        d.HighBit, d.PixelRepresentation = d.BitsStored - 1, int(array.dtype.kind == "i")
        d.RescaleSlope, d.RescaleIntercept = "1", "0" if mr else "-1024"
        d.PixelSpacing, d.SliceThickness = [1, 1], 1
        d.ImageOrientationPatient, d.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, z]
        d.PixelData = np.ascontiguousarray(array[:, :, z].T).tobytes()
        d["PixelData"].VR = "OW"
        for name, value in tags.items():
            delattr(d, name) if value is GONE else setattr(d, name, value)
        if each:
            each(d, z)
        d.save_as(folder / f"{series[-6:]}-{z:03d}.dcm", enforce_file_format=True)
    return folder
