"""Which matrix of a NIfTI header says where the voxels lie: sform or qform, in millimetres."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from medlore.data.volumes.geometry import Array, orientation_of, spacing_of
from medlore.errors import DataError

AffineChoice = Literal["auto", "sform", "qform"]

_VOXELS_ALIKE = 0.1  # sform and qform may lie this far apart (in voxels, at any corner) and count as equal
_MM = {1: 1000.0, 3: 0.001}  # code of a unit of length -> millimetres; 2 is mm, 0 is not said
_LONGER_BY_ROUNDING = 1e-3  # a unit quaternion that is longer than 1 by no more than this is scaled


def affine_of(header: Any, choice: AffineChoice, path: Path) -> tuple[Array, list[str]]:
    """The affine of a NIfTI header, voxel index -> RAS+ mm, and what was odd about it.

    Raises:
        DataError: no orientation, two that contradict each other, or not the one that was asked for.
    """
    unit = int(header["xyzt_units"]) & 7
    notes = [f"lengths are given in {'metres' if unit == 1 else 'microns'}, and were taken so"] if unit in _MM else []
    notes += [f"the code {unit} of the unit of length is not known: millimetres were taken"] if unit > 3 else []
    if choice != "auto":
        chosen = _form(header, choice, path)
        if chosen is None:
            raise DataError(str(path), f"has no {choice}", "a header that holds it", "use --affine auto")
        return chosen, [*notes, f"affine taken from the {choice}, as asked"]
    sform, qform = _form(header, "sform", path), _form(header, "qform", path)
    if sform is None and qform is None:
        accepted, fix = "a header with an orientation", "write a qform or sform, e.g. with dcm2niix or fslorient; sides cannot be guessed"
        raise DataError(str(path), "neither sform nor qform: left and right are not known", accepted, fix)
    if sform is None or qform is None:
        return (qform if sform is None else sform), notes  # type: ignore[return-value]
    return sform, [*notes, *_compare_forms(sform, qform, header.get_data_shape(), path)]


def _form(header: Any, name: str, path: Path) -> Array | None:
    """The sform or qform in millimetres; None where its code is 0. A quaternion that rounding made too long is scaled, as ITK does."""
    if int(header[f"{name}_code"]) <= 0:
        return None
    if name == "qform":
        parts = np.array([float(header[f"quatern_{axis}"]) for axis in "bcd"])
        length = float(np.linalg.norm(parts))
        if not length <= 1 + _LONGER_BY_ROUNDING:
            accepted, fix = "one of length 1", "use --affine sform if that one is right, or export the file again"
            raise DataError(str(path), f"a qform whose quaternion has the length {length:.4g}", accepted, fix)
        if length > 1:
            header = header.copy()
            for axis, value in zip("bcd", parts / length, strict=True):
                header[f"quatern_{axis}"] = value
    matrix = np.array(getattr(header, f"get_{name}")(), float)
    matrix[:3] *= _MM.get(int(header["xyzt_units"]) & 7, 1.0)
    return matrix


def _compare_forms(sform: Array, qform: Array, shape: tuple[int, ...], path: Path) -> list[str]:
    size = np.asarray((*shape, 1, 1)[:3]) - 1
    corners = np.array([[x, y, z, 1] for x in (0, size[0]) for y in (0, size[1]) for z in (0, size[2])], float)
    apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    smallest = float(spacing_of(sform).min())
    if apart <= _VOXELS_ALIKE * max(smallest, 1e-6):
        return []
    if spacing_of(qform).min() > 0 and orientation_of(sform) == orientation_of(qform):
        return [f"sform and qform lie up to {apart:.2f} mm apart; the sform was taken"]
    codes = " against ".join(orientation_of(m) if spacing_of(m).min() > 0 else "none" for m in (sform, qform))
    accepted, fix = "two matrices that agree", "say which one is right with --affine sform or --affine qform"
    raise DataError(str(path), f"sform and qform contradict each other (orientation {codes})", accepted, fix)
