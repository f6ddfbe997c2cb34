"""The challenge's result files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medlore.data.images.submission import submission_name, validate_submission, write_submission
from medlore.errors import DataError, InputError, UnknownNameError

FILES = ["b 1.png", "a,2.png", "c.png"]


def test_names() -> None:
    assert [submission_name(d, k) for d in ("endo", "colon", "chest") for k in (1, 5, 10)] == [  # type: ignore[arg-type]
        f"{d}_{k}-shot_submission.csv" for d in ("endo", "colon", "chest") for k in (1, 5, 10)
    ]
    with pytest.raises(InputError, match="1, 5 or 10"):
        submission_name("endo", 2)
    with pytest.raises(UnknownNameError, match="chest"):
        submission_name("lung", 1)  # type: ignore[arg-type]


def test_written_and_read_back(tmp_path: Path) -> None:
    scores = np.array([[0.25, 0.75], [1, 0], [1 / 3, 2 / 3]])
    path = write_submission(tmp_path / "out", dataset="colon", shots=5, files=FILES, scores=scores)
    assert path == tmp_path / "out" / "colon_5-shot_submission.csv"
    assert path.read_text() == 'b 1.png,0.25000000,0.75000000\n"a,2.png",1.00000000,0.00000000\nc.png,0.33333333,0.66666667\n'
    assert validate_submission(path, files=FILES) == 3
    assert validate_submission(path) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.1])
def test_wrong_scores_are_not_written(tmp_path: Path, bad: float) -> None:
    with pytest.raises(DataError, match=r"line 2.*is no score"):
        write_submission(tmp_path, dataset="colon", shots=1, files=FILES, scores=np.array([[0.5, 0.5], [0.5, bad], [0, 1]]))
    assert list(tmp_path.iterdir()) == []


def test_wrong_shape_and_doubled_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shape \(3, 2\)"):
        write_submission(tmp_path, dataset="chest", shots=1, files=FILES, scores=np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"line 2: a\.png stands already on line 1"):
        write_submission(tmp_path, dataset="colon", shots=1, files=["a.png", "a.png"], scores=np.zeros((2, 2)))


def test_all_faults_of_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "endo_1-shot_submission.csv"
    path.write_text("filename,a,b,c,d\na.png,0,0,0,0\nc.png,0,2,x,0\nb.png,0,0,0\n")
    with pytest.raises(DataError) as caught:
        validate_submission(path, files=["a.png", "b.png", "c.png"])
    text = str(caught.value)
    for words in ("line 1: filename where a.png belongs", "line 1: 'a' is no score", "line 3: '2' is no score from 0 to 1 (and 1 more)",
                  "line 4: 4 columns instead of 5", "4 lines for 3 files"):  # fmt: skip
        assert words in text
    path.write_text("")
    with pytest.raises(DataError, match="no lines"):
        validate_submission(path)
    path.rename(tmp_path / "other.csv")
    with pytest.raises(UnknownNameError):
        validate_submission(tmp_path / "other.csv")
    with pytest.raises(InputError, match="no such file"):
        validate_submission(tmp_path / "gone.csv")
