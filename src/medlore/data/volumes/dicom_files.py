"""DICOM files below a path: which there are, read header by header, none passed over in silence that should have been an image.

A folder is walked once, links that lead back up are not followed, and what is no plain file is left alone. A zip is hostile:
it is read in memory, member by member, within limits. Values of a header are numbers or a fault, never an exception of pydicom.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlore.data.codestreams import check_deflated, is_deflated
from medlore.data.images.trees import ArchiveMember, FolderTree, ZipTree, read_member
from medlore.errors import DataError, MedloreError, MissingExtraError
from medlore.extras import require

_MARK = b"DICM"
_ZIP = b"PK\x03\x04"
_FIRST_TAGS = (b"\x08\x00\x00\x00", b"\x08\x00\x01\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x08\x00\x16\x00")
_OF_AN_IMAGE = ("Columns", "BitsAllocated", "SamplesPerPixel")
_NO_IMAGE = frozenset({"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "FID", "DOC"})


@dataclass(frozen=True)
class DicomFile:
    """One image object: where it is, and its header without pixels.

    Args:
        source: a file, or a member of a zip.
        header: the pydicom data set.
        frame: of an enhanced multi-frame object, from 0; None for an image of one frame.
    """

    source: Path | ArchiveMember
    header: Any
    frame: int | None = None

    def text(self, name: str) -> str:
        """An attribute as text; empty where it is absent or empty."""
        try:
            value = self.header.get(name)
        except Exception as error:  # pydicom decodes when a value is asked for
            raise self._fault(name, error) from error
        return "" if value is None else str(value).strip()

    def numbers(self, name: str, count: int) -> list[float] | None:
        """So many finite numbers; None where the attribute is absent or empty.

        Raises:
            DataError: something else stands there.
        """
        try:
            value = self.header.get(name)
            parts = [value] if isinstance(value, str | int | float) or not hasattr(value, "__iter__") else list(value)
            found = [float(part) for part in parts if part is not None and str(part).strip() != ""]
        except Exception as error:
            raise self._fault(name, error) from error
        if not found:
            return None
        if len(found) != count or not all(math.isfinite(number) for number in found):
            raise self._fault(name, f"{len(found)} values: {found[:3]}")
        return found

    def number(self, name: str, default: float) -> float:
        """One number, or the default where the attribute is absent or empty."""
        found = self.numbers(name, 1)
        return float(default) if found is None else found[0]

    def _fault(self, name: str, what: object) -> DataError:
        return DataError(str(self.source), f"{name} cannot be used ({what})", "what the DICOM standard says", "correct or export it again")


def find_files(path: Path, *, modality: str | None = None) -> list[DicomFile]:
    """All image objects in a folder (searched through and through) or a zip, or in one file.

    Args:
        path: the folder, zip or file.
        modality: `SEG` or `RTSTRUCT`: look for these objects in place of images.

    Raises:
        DataError: the zip cannot be read, or some files are DICOM and cannot be read, or say another modality than their series: one of
            them may be a missing slice.
        MissingExtraError: pydicom is not installed.
    """
    found: list[DicomFile] = []
    others: list[DicomFile] = []
    faults: list[str] = []
    for source in sources_of(path):
        try:
            header = read_header(source)
        except MissingExtraError:
            raise
        except MedloreError as error:
            faults.append(f"{source}: {error.came}")
            continue
        if header is not None:
            (found if _is_wanted(header, modality) else others).append(DicomFile(source, header))
    series = {uid for file in found if (uid := file.text("SeriesInstanceUID"))}
    strangers = [file for file in others if file.text("SeriesInstanceUID") in series]
    faults += [f"{file.source}: modality {file.text('Modality') or 'none'} in a series of others" for file in strangers]
    if faults:
        accepted, fix = "whole files: each may be a slice that would be missing", "copy them again, or take them out of the folder"
        raise DataError(str(path), f"{len(faults)} DICOM file(s) that cannot be read", accepted, fix, faults=faults)
    return found


def sources_of(path: Path) -> Iterator[Path | ArchiveMember]:
    """The plain files of a folder, the members of a zip, or the file itself."""
    if path.is_dir():
        tree = FolderTree(path)
        yield from (path / name for name in tree.names if (path / name).is_file() and Path(name).name != "DICOMDIR")
    elif _first_bytes(path)[:4] == _ZIP or path.suffix.casefold() == ".zip":
        archive = ZipTree(path)
        yield from (archive.source(name) for name in archive.names)
    else:
        yield path


def is_dicom(head: bytes) -> bool:
    """Whether these are the first bytes of a DICOM file, or of a zip."""
    return head[:4] == _ZIP or head[128:132] == _MARK or head[:4] in _FIRST_TAGS


def holds_images(folder: Path, *, beside: Sequence[Path] = ()) -> bool:
    """Whether a folder holds a DICOM image at any depth, looked for in files other than `beside`."""
    others = set(beside)
    for source in sources_of(folder):
        head = b"" if source in others or isinstance(source, ArchiveMember) else _first_bytes(source)
        if is_dicom(head) and head[:4] != _ZIP:
            try:
                header = read_header(source)
            except MissingExtraError:  # what it is cannot be said without pydicom; that it is DICOM can
                return True
            except MedloreError:
                continue
            if header is not None and _is_wanted(header, None):
                return True
    return False


def read_header(source: Path | ArchiveMember, *, pixels: bool = False) -> Any | None:
    """A data set; None where the file is no DICOM and does not look like it.

    Raises:
        DataError: it looks like DICOM and cannot be read.
        MissingExtraError: pydicom is not installed.
    """
    pydicom = require("pydicom", f"reading DICOM from {source}")
    content = read_member(source) if isinstance(source, ArchiveMember) else _beginning(source)
    head = content[:132]
    marked = head[128:132] == _MARK
    if not (marked or head[:4] in _FIRST_TAGS):
        if str(source).casefold().endswith(".dcm"):
            raise _broken(source, "an empty file" if not head else "no DICOM in it")
        return None
    try:
        check_deflated(content, source)
        place: Any = io.BytesIO(content) if isinstance(source, ArchiveMember) else str(source)
        dataset = pydicom.dcmread(place, stop_before_pixels=not pixels, force=not marked)
        if len(dataset.file_meta) and "TransferSyntaxUID" not in dataset.file_meta:
            raise _broken(source, "its meta group names no transfer syntax, so nothing says how its pixels are stored")
        if "TransferSyntaxUID" not in dataset.file_meta:  # no meta group: what was found while reading
            implicit, little = dataset.original_encoding
            plain = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
            dataset.file_meta.TransferSyntaxUID = plain if little else pydicom.uid.ExplicitVRBigEndian
        whole = _is_whole(dataset)
    except MedloreError:
        raise
    except Exception as error:  # pydicom's errors share no parent
        raise _broken(source, f"{type(error).__name__}: {error}") from error
    if not whole:
        raise _broken(source, "its header is cut off")
    return dataset


def _is_whole(dataset: Any) -> bool:
    """Whether a header says what it is of, and an image its size; one that is cut off is read without complaint."""
    if "Rows" in dataset or "DirectoryRecordSequence" in dataset:
        return True
    kind = dataset.get("SOPClassUID")
    return kind is not None and not kind.name.endswith("Image Storage") and not any(name in dataset for name in _OF_AN_IMAGE)


def _is_wanted(header: Any, wanted: str | None) -> bool:
    modality = str(header.get("Modality") or "")
    if wanted is not None:
        return modality == wanted
    return modality not in _NO_IMAGE and "Rows" in header


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(132)


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; all of them where they say that it is deflated."""
    with path.open("rb") as stream:
        content = stream.read(4096)
        return content + stream.read() if is_deflated(content) else content


def _broken(source: Path | ArchiveMember, reason: str) -> DataError:
    return DataError(str(source), f"a damaged DICOM file ({reason})", "a complete DICOM file", "copy or export it again")
