"""The last sentence of a run: better than the constant answer and than the regression, by how much, how sure, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PROBE = "the logistic regression on the frozen features"
_CLEAR = 0.005  # differences below it are none in practice


def verdict_of(test: Mapping[str, Any], reference: Mapping[str, Any] | None, *, is_reference: bool = False) -> str:
    """The verdict on one set of test images.

    Args:
        test: a `classification_report`.
        reference: what `reference.compared` says; None where there is nothing to compare with.
        is_reference: whether the model is that regression itself.

    Example:
        >>> accuracy = {"value": 0.7, "low": 0.6, "high": 0.8}
        >>> report = {"items": 50, "task": "single", "metrics": {"balanced_accuracy": accuracy}, "majority": {"balanced_accuracy": 0.5}}
        >>> verdict_of(report, None)
        'Balanced accuracy 0.700 (0.600 to 0.800) on 50 images: better than the majority answer (0.500).'
    """
    measure = "balanced_accuracy" if test["task"] == "single" else "macro_auc"
    found, constant = test["metrics"][measure], test["majority"][measure]
    name = "Balanced accuracy" if test["task"] == "single" else "Mean AUC"
    if found["value"] is None:
        return f"{name} is not defined on these {test['items']} images: they lack positive or negative ones. Give other test images."
    lead = f"{name} {found['value']:.3f}{_range(found)} on {test['items']} images"
    learnt = _learnt(found, constant)
    sentences = [f"{lead}: {learnt}."]
    if is_reference:
        sentences.append(f"This is {_PROBE} itself; --method auto tries whether tuning the network gains more.")
    elif reference is not None and reference["difference"]["value"] is not None:
        sentences.append(_beside(reference["difference"]))
    if learnt.startswith("learnt nothing"):
        sentences.append(
            "More labelled images, larger ones (--image-size) or a backbone trained on similar images (--model) may change that."
        )
    return " ".join(sentences)


def _learnt(found: Mapping[str, Any], constant: float | None) -> str:
    if constant is None:
        return "there is no majority answer to compare it with"
    if found["low"] is None:
        return f"the majority answer reaches {constant:.3f}; without resamples nothing says how sure the difference is"
    if found["low"] > constant:
        return f"better than the majority answer ({constant:.3f})"
    return f"learnt nothing that these images can show (the majority answer reaches {constant:.3f})"


def _beside(difference: Mapping[str, Any]) -> str:
    value, low, high = difference["value"], difference["low"], difference["high"]
    if low is None or high is None:
        return f"{_PROBE[0].upper()}{_PROBE[1:]} differs by {value:+.3f}; without resamples nothing says how sure that is."
    size = f"{abs(value):.3f} (95 % interval of the difference {low:+.3f} to {high:+.3f})"
    if low > 0:
        return f"It is better than {_PROBE} with the same labels by {size}."
    if high < 0:
        return f"It is worse than {_PROBE} with the same labels by {size}: take --method linear-probe or --method auto."
    if abs(value) < _CLEAR and high - low < 4 * _CLEAR:
        return f"It is as good as {_PROBE} with the same labels, to {size}: --method linear-probe gives the same in seconds."
    return (
        f"These images cannot tell it from {_PROBE} with the same labels: the difference is {value:+.3f} ({low:+.3f} to {high:+.3f}). "
        "--method linear-probe is the simpler choice; --method auto chooses on the training images."
    )


def _range(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f" ({entry['low']:.3f} to {entry['high']:.3f})"
