"""Empty, -1 and NaN labels of multi-label sets: a fault with line and column, or what the user says; never a class that vanishes.

The case `chexpert_blanks` is a table whose class Cardiomegaly was gone because one cell of it was empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from medlore.data.images.imageset import from_arrays
from medlore.data.images.inspect import describe_images
from medlore.data.images.reading import read_images
from medlore.data.images.splits import SplitRules, hold_out, read_splits
from medlore.errors import DataError
from medlore.losses import task_loss
from medlore.metrics.classification import classification_report
from medlore.metrics.ranking import macro_auc
from medlore.tuning.probe import fit_probe, fold_rows, log_likelihood


@pytest.fixture
def chexpert_blanks(tmp_path: Path) -> Path:
    """Edema is whole; Cardiomegaly is empty on line 9 and -1 on line 4; Fracture is filled on line 5 alone."""
    rows = ["Path,Sex,Age,Edema,Cardiomegaly,Fracture"]
    for k in range(12):
        Image.fromarray(np.full((8, 8), 20 * k, np.uint8)).save(tmp_path / f"{k}.png")
        cardiomegaly = {7: "", 2: "-1.0"}.get(k, str((k // 2) % 2))
        rows.append(f"{k}.png,F,{40 + k},{k % 2},{cardiomegaly},{'1' if k == 3 else ''}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    return tmp_path / "t.csv"


@pytest.mark.case("chexpert_blanks")
def test_chexpert_blanks_are_faults_with_line_and_column(chexpert_blanks: Path) -> None:
    with pytest.raises(DataError, match=r"--missing-labels negative .* --missing-labels ignore") as caught:
        read_images(chexpert_blanks)
    assert len(caught.value.faults) == 11  # every line but the fifth, in one message
    assert caught.value.faults[2] == "line 4: column 'Cardiomegaly' holds -1.0; column 'Fracture' is empty"
    assert caught.value.faults[6] == "line 9: column 'Cardiomegaly' is empty; column 'Fracture' is empty"


@pytest.mark.case("chexpert_blanks")
@pytest.mark.parametrize(("policy", "blank", "missing"), [("negative", 0.0, 0), ("ignore", np.nan, 13)])
def test_a_stated_policy_keeps_every_class(chexpert_blanks: Path, policy: Any, blank: float, missing: int) -> None:
    found = read_images(chexpert_blanks, missing_labels=policy)
    assert found.counts() == {"Edema": 6, "Cardiomegaly": 4, "Fracture": 1}
    wanted = [[k % 2, (k // 2) % 2, 1 if k == 3 else blank] for k in range(12)]
    wanted[7][1] = wanted[2][1] = blank
    assert np.array_equal(found.targets(), np.array(wanted, np.float32), equal_nan=True)
    assert found.missing_labels == missing
    assert any("13 labels are missing" in note for note in found.notes)
    splits = read_splits(chexpert_blanks, SplitRules(test_fraction=0.3), missing_labels=policy)
    assert any("13 labels are missing" in note for note in splits.notes)


def test_bad_values_are_faults_under_every_policy(chexpert_blanks: Path) -> None:
    text = chexpert_blanks.read_text().replace("0.png,F,40,0,0,", "0.png,F,40,zero,-2,inf")
    chexpert_blanks.write_text(text)
    for policy in ("negative", "ignore"):
        with pytest.raises(DataError) as caught:
            read_images(chexpert_blanks, missing_labels=policy)  # type: ignore[arg-type]
        (fault,) = caught.value.faults
        assert fault.startswith("line 2: column 'Edema' holds 'zero', not a number; column 'Cardiomegaly' holds -2: a count")
        assert "column 'Fracture' holds inf" in fault


def test_a_column_without_numbers_is_named_not_taken(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("L", (4, 4)).save(tmp_path / f"{k}.png")
    (tmp_path / "t.csv").write_text("file,view,RBC,later\n0.png,AP,1,\n1.png,PA,0,\n2.png,PA,3,\n")
    found = read_images(tmp_path / "t.csv")
    assert (found.classes, found.notes) == (("RBC",), ("columns without numbers, taken for no class: 'view', 'later'",))
    named = read_images(tmp_path / "t.csv", classes=("RBC", "later"), missing_labels="ignore")
    assert (named.counts(), named.missing_labels) == ({"RBC": 2, "later": 0}, 3)


def test_an_empty_list_of_findings_is_missing_too(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("L", (4, 4)).save(tmp_path / f"{k}.png")
    table = tmp_path / "t.csv"
    table.write_text("file,labels\n0.png,Mass|Edema\n1.png,\n2.png,No Finding\n")
    with pytest.raises(DataError, match="line 3: column 'labels' is empty"):
        read_images(table)
    assert read_images(table, missing_labels="negative").targets().tolist() == [[1, 1], [0, 0], [0, 0]]
    assert np.isnan(read_images(table, missing_labels="ignore").targets()).tolist() == [[False, False], [True, True], [False, False]]


def test_arrays_and_npz_files_have_the_same_rule(tmp_path: Path) -> None:
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([[1, -1], [np.nan, 0], [0, 1]])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=["a", "b"])
    with pytest.raises(DataError, match="2 labels are missing") as caught:
        read_images(tmp_path / "a.npz")
    assert caught.value.faults == ("image 0: no label for b", "image 1: no label for a")
    assert read_images(tmp_path / "a.npz", missing_labels="negative").targets().tolist() == [[1, 0], [0, 0], [0, 1]]
    ignored = read_images(tmp_path / "a.npz", missing_labels="ignore")
    assert np.array_equal(ignored.targets(), [[1, np.nan], [np.nan, 0], [0, 1]], equal_nan=True)
    with pytest.raises(DataError, match="out of range"):
        from_arrays(images, np.array([[1, -2], [0, 0], [0, 1]]), classes=["a", "b"], name="x", missing_labels="ignore")


def test_missing_cells_of_a_one_hot_table_do_not_choose_the_class(tmp_path: Path) -> None:
    images, rows = np.zeros((2, 8, 8), np.uint8), np.array([[np.nan, 1, 0], [1, -1, np.nan]])
    np.savez(tmp_path / "a.npz", images=images, labels=rows, classes=["a", "b", "c"])
    with pytest.raises(DataError, match="--missing-labels"):
        read_images(tmp_path / "a.npz", task="single")
    assert read_images(tmp_path / "a.npz", task="single", missing_labels="negative").targets().tolist() == [1, 0]
    np.savez(tmp_path / "b.npz", images=images, labels=np.array([[np.nan, 0, 0], [1, 0, 0]]), classes=["a", "b", "c"])
    with pytest.raises(DataError, match="exactly one 1"):
        read_images(tmp_path / "b.npz", task="single", missing_labels="ignore")


@pytest.mark.parametrize("labels", [np.array(["sick", "well"]), np.array([0.0, np.nan]), np.array([1, 2], complex)])
def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path, labels: Any) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=labels)
    with pytest.raises(DataError, match="faults in the labels"):
        read_images(tmp_path / "a.npz")
    with pytest.raises(DataError):
        from_arrays(np.zeros((2, 8, 8), np.uint8), labels, classes=["a", "b"], name="x")


def test_the_description_counts_them(chexpert_blanks: Path) -> None:
    found = describe_images(chexpert_blanks)
    assert (found["missing_labels"], found["classes"], found["without_label"]) == (13, {"Edema": 6, "Cardiomegaly": 4, "Fracture": 1}, 4)


def drawn(seed: int = 0, count: int = 60) -> tuple[Any, Any]:
    """Labels (b, 3) of which a third is unknown, and scores."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, (count, 3)).astype(float)
    targets[rng.random((count, 3)) < 0.35] = np.nan
    return targets, rng.random((count, 3)) * 0.6 + 0.4 * np.nan_to_num(targets)


def test_metrics_are_those_of_the_known_labels() -> None:
    targets, scores = drawn()
    report = classification_report(targets, scores, classes="abc", task="multi", bootstrap=200)
    known = ~np.isnan(targets)
    for c, entry in enumerate(report["per_class"]):
        rows = known[:, c]
        assert (entry["labelled"], entry["positives"]) == (rows.sum(), np.nansum(targets[:, c]))
        assert entry["auc"]["value"] == pytest.approx(roc_auc_score(targets[rows, c], scores[rows, c]))
        assert entry["average_precision"]["value"] == pytest.approx(average_precision_score(targets[rows, c], scores[rows, c]))
        assert entry["auc"]["low"] < entry["auc"]["value"] < entry["auc"]["high"]
    assert macro_auc(targets, scores) == pytest.approx(report["metrics"]["macro_auc"]["value"])
    right = (scores >= 0.5) == targets
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(right[known].mean())
    some = known.any(axis=1)
    assert report["metrics"]["exact_match"]["value"] == pytest.approx((right | ~known).all(axis=1)[some].mean())
    answered = ((scores >= 0.5) & known).sum()
    assert report["metrics"]["overall_precision"]["value"] == pytest.approx((right & (targets == 1)).sum() / answered)
    often = np.nanmean(targets, axis=0) > 0.5
    assert report["majority"]["labels"] == [name for name, more in zip("abc", often, strict=True) if more]


def test_an_image_without_any_known_label_changes_nothing() -> None:
    targets, scores = drawn()
    kept = ~np.isnan(targets).all(axis=1)
    whole, part = (
        classification_report(targets[rows], scores[rows], classes="abc", task="multi", bootstrap=0) for rows in (slice(None), kept)
    )
    assert (whole["metrics"], whole["per_class"]) == (part["metrics"], part["per_class"])
    nothing = classification_report(np.full((4, 2), np.nan), np.full((4, 2), 0.5), classes="ab", task="multi", bootstrap=20)
    assert {entry["value"] for name, entry in nothing["metrics"].items() if name in ("macro_auc", "accuracy", "exact_match")} == {None}


def test_the_loss_is_the_mean_over_known_labels() -> None:
    targets = torch.tensor(drawn()[0], dtype=torch.float32)
    logits = torch.randn(targets.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    known = ~targets.isnan()
    loss = task_loss(logits, targets, "multi")
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], targets[known])
    assert torch.allclose(loss, wanted)
    (slope,) = torch.autograd.grad(loss, logits)
    (right,) = torch.autograd.grad(wanted, logits)
    assert torch.allclose(slope, right)
    assert not slope[~known].any()
    full = torch.full((2, 3), torch.nan)
    assert float(task_loss(torch.randn(2, 3), full, "multi")) == 0.0


def test_the_probe_of_each_label_sees_the_known_images_alone() -> None:
    targets, _ = drawn(count=80)
    features = np.random.default_rng(1).normal(size=(80, 5)) + np.nan_to_num(targets) @ np.ones((3, 5))
    probe = fit_probe(features, targets, classes=3, task="multi", strength=1.0)
    standard = (features - features.mean(0)) / features.std(0)
    for c in range(3):
        rows = ~np.isnan(targets[:, c])
        reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(standard[rows], targets[rows, c])
        assert np.allclose(probe.weight[c], reference.coef_[0], atol=1e-3)
    assert np.isfinite(log_likelihood(probe.logits(features), targets, "multi"))
    assert sum(len(held) for _, held in fold_rows(targets, "multi", None, folds=4, seed=0)) == 80


def test_splitting_counts_only_what_is_known() -> None:
    labels = np.array([[1, -1]] * 2 + [[0, 1]] * 6 + [[-1, 0]] * 6)
    pool = from_arrays(np.zeros((14, 8, 8), np.uint8), labels, classes=["a", "b"], name="x", missing_labels="ignore")
    rest, held = hold_out(pool, 0.3, seed=0)
    assert min(rest.counts().values()) >= 1  # the last known image of a class is never split off
    assert len(rest) + len(held) == 14
