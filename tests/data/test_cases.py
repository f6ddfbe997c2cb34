"""The jsonl of cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medlore.data.formats import find_images
from medlore.data.volumes.cases import Case, folder_names, read_cases, write_cases
from medlore.errors import DataError, InputError


def test_a_published_line_is_read_and_written_back(tmp_path: Path) -> None:
    line = {"image": "a/ct.nii.gz", "label": ["liver", "left  kidney"], "modality": "ct", "dataset": "AMOS22_CT_abdomen", "extra": 3}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line) + "\n\n", encoding="utf-8")
    (case,) = read_cases(tmp_path / "cases.jsonl")
    assert case.image == tmp_path / "a" / "ct.nii.gz"
    assert case.labels == ("liver", "left kidney")
    assert (case.dataset, case.line, case.other) == ("AMOS22_CT_abdomen", 1, {"extra": 3})
    write_cases(tmp_path / "again.jsonl", [case])
    (again,) = read_cases(tmp_path / "again.jsonl")
    assert (again.image, again.labels, again.other) == (case.image, case.labels, case.other)


def test_absolute_paths_stay(tmp_path: Path) -> None:
    image = tmp_path / "elsewhere" / "ct.nii"
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": str(image), "label": ["liver"], "modality": "ct"}))
    assert read_cases(tmp_path / "c.jsonl")[0].image == image


def test_all_broken_lines_are_reported_with_their_numbers(tmp_path: Path) -> None:
    good = '{"image": "a.nii", "label": ["liver"], "modality": "ct"}'
    lines = [
        good,
        "{not json",
        "[1, 2]",
        '{"image": "a.nii", "label": "liver"}',
        '{"image": "a.nii", "label": ["liver", "Liver"], "modality": "ct"}',
        '{"image": "a.nii", "label": ["liver"], "modality": "ct", "frame": "x", "mask": 3}',
        "",
        good,
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_cases(tmp_path / "c.jsonl")
    text = str(caught.value)
    assert "7 fault(s)" in text
    parts = (
        "line 2: not JSON",
        "line 3: a list",
        'line 4: no "modality"',
        'line 4: "label" is not a list',
        "line 5: label 'liver' comes twice",
        'line 6: "frame"',
        'line 6: "mask" is not text',
    )
    for part in parts:
        assert part in text


def test_an_empty_list_and_an_image_instead_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no line holds a case"):
        read_cases(tmp_path / "c.jsonl")
    (tmp_path / "i.jsonl").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="not UTF-8"):
        read_cases(tmp_path / "i.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_cases(tmp_path / "none.jsonl")


def test_folder_names_are_unique() -> None:
    def case(path: str) -> Case:
        return Case(Path(path), (), "ct")

    assert folder_names([case("x/a.nii.gz"), case("y/A.nii"), case("b.v2.nii.gz"), case("x/a.nii.gz")]) == ["x_a", "y_A", "b.v2", "x_a_2"]
    # the number that one gets may be another image's name
    assert folder_names([case("p/i/ct.nii"), case("q/i/ct.nii"), case("r/i_ct_2.nii")]) == ["i_ct", "i_ct_2", "i_ct_2_2"]
    # no name may lead out of the folder, or be taken for a half-written file
    assert [case(path).name for path in ("a/..", "..nii.gz", "b/.part-x.nii")] == ["image", "image", "part-x"]
    assert len({n.casefold() for n in folder_names([case(f"p/c{s}") for s in (".nii", ".nii.gz", ".nrrd")])}) == 3


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii", "notes.txt", "c.nrrd"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.nii", "b.nii.gz", "c.nrrd"]


@pytest.mark.case("small_things")
def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Other characters that Python counts as ends of lines may stand in a text of JSON."""
    extra = {"note": "a\u2028b\x85c\x0bd"}
    write_cases(tmp_path / "c.jsonl", [Case(tmp_path / "a.nii", ("liver",), "ct", other=extra)] * 2)
    assert [case.other for case in read_cases(tmp_path / "c.jsonl")] == [extra, extra]
    (tmp_path / "w.jsonl").write_bytes((tmp_path / "c.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert [case.line for case in read_cases(tmp_path / "w.jsonl")] == [1, 2]


def test_every_suffix_of_the_table_is_left_out_of_names() -> None:
    from medlore.data.formats import FORMATS

    for suffix in (suffix for format_ in FORMATS for suffix in format_.suffixes):
        assert Case(Path(f"a/ct.v2{suffix}"), (), "ct").name == Case(Path(f"a/ct.v2{suffix.upper()}"), (), "ct").name == "ct.v2"
