"""Every message has its four parts, and names outside a list bring the nearest ones."""

from __future__ import annotations

import pytest

from medlore.errors import InputError, MedloreError, StepError, UnknownNameError, nearest_names


def test_message_has_four_parts_in_order() -> None:
    text = str(InputError("cases.jsonl, line 3", "no image", "a path", "add one"))
    assert text == "cases.jsonl, line 3: no image. Accepted: a path. To do: add one."


def test_all_faults_are_listed_and_the_rest_is_counted() -> None:
    text = str(InputError("f", "c", "a", "t", faults=[f"line {i}" for i in range(23)]))
    assert "  - line 19" in text
    assert "line 20" not in text
    assert text.endswith("  - and 3 more")


def test_context_is_added_in_front() -> None:
    error = InputError("weight", "NaN", "finite numbers", "check the file", faults=["row 1"])
    assert str(error.at("model.safetensors")).startswith("model.safetensors: weight: NaN.")
    assert "row 1" in str(error)


def test_exit_status_tells_wrong_input_from_failed_step() -> None:
    assert (InputError.exit_status, StepError.exit_status, MedloreError.exit_status) == (2, 1, 1)


def test_unknown_name_gives_the_three_nearest() -> None:
    error = UnknownNameError("--labels", "livr", ["spleen", "liver", "liver tumour", "kidney", "aorta"])
    assert error.accepted.startswith("5 names; the nearest are 'liver'")
    assert error.accepted.count("'") == 6


def test_nearest_of_nothing() -> None:
    assert nearest_names("x", []) == []
    with pytest.raises(UnknownNameError, match="the list is empty"):
        raise UnknownNameError("w", "x", [])
