"""Every volume reader of the table, under every fault of its kind: the value of an independent reader, or one clear refusal.

Headers are drawn, then damaged: fields of any value, other types, slopes, lengths, attributes taken out. What comes out is
either what nibabel, SimpleITK or pydicom make of the same bytes, at the place that they give it, or a `MedloreError` that names
the file. Nothing else: no exception of a library, no value that nobody else reads, and a valid file is never refused.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from medlore.data.formats import FORMATS, ReadOptions, read_grid, read_mask_file
from medlore.data.volumes.preparation import read_volume
from medlore.errors import MedloreError
from reader_samples import KINDS, Kind, Sample, Values

_PHASES = (Phase.explicit, Phase.generate)  # to make a failing file smaller takes minutes, and shows little


def test_every_format_of_the_table_has_its_faults() -> None:
    assert set(KINDS) == {format_.name for format_ in FORMATS}


def read(path: Path, name: str) -> Values:
    if name == "NumPy":
        found = read_mask_file(path)
        return np.stack(found.layers) if len(found.layers) > 1 else found.layers[0], None
    volume = read_volume(path)
    shape, affine = read_grid(path, ReadOptions())
    assert (shape, affine.tolist()) == (volume.shape, volume.affine.tolist()), "the grid from the header is another than the volume's"
    return volume.array, volume.affine


def judge(sample: Sample, kind: Kind, name: str, outcomes: Counter[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for file, content in sample.files.items():
            (Path(folder) / file).write_bytes(content)
        path = Path(folder) / sample.name if sample.name else Path(folder)
        refusal: MedloreError | None = None
        try:
            array, affine = read(path, name)
        except MedloreError as error:
            refusal = error
        if refusal is not None:
            assert not sample.sound, f"a valid file was refused: {refusal}"
            assert folder in str(refusal), f"the message names no file: {refusal}"
            assert all((refusal.where, refusal.came, refusal.accepted, refusal.fix))
            outcomes["refused"] += 1
            return
        warnings.simplefilter("ignore")
        wanted, place = kind.independent(path)
        outcomes["read"] += 1
    assert np.squeeze(array).shape == np.squeeze(wanted).shape
    wanted = wanted.reshape(array.shape)
    large = float(np.nanmax(np.abs(np.nan_to_num(wanted.astype(float), posinf=0, neginf=0)), initial=0))
    with np.errstate(all="ignore"):
        assert np.allclose(
            array, wanted.astype(np.result_type(array.dtype, np.float32)), rtol=1e-5, atol=1e-5 * min(large, 1e4), equal_nan=True
        )
    if place is not None and affine is not None:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in array.shape], (1,))).reshape(4, -1)
        assert np.allclose(affine @ corners, place @ corners, atol=0.1, rtol=1e-5), f"{affine} against {place}"


def run(name: str, examples: int, *, fixed: bool) -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples, deadline=None, derandomize=fixed, database=None, phases=_PHASES, suppress_health_check=list(HealthCheck)
    )
    @given(KINDS[name].samples)
    def check(sample: Sample) -> None:
        judge(sample, KINDS[name], name, outcomes)

    check()
    total = sum(outcomes.values())
    assert total >= examples * 0.9
    assert min(outcomes["read"], outcomes["refused"]) > total * 0.1, f"a suite that only reads or only refuses shows nothing: {outcomes}"


@pytest.mark.parametrize("name", KINDS)
def test_the_value_of_another_reader_or_a_refusal(name: str) -> None:
    run(name, 300, fixed=True)


@pytest.mark.full
@pytest.mark.parametrize("name", KINDS)
def test_the_same_for_ten_thousand(name: str) -> None:
    run(name, 10_000, fixed=False)
