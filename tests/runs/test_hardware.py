"""Device, precision and memory are decided once: the plan of a case is made for what runs, also on a CUDA machine (emulated)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medlore.errors import InputError
from medlore.runs import hardware
from medlore.runs.hardware import Hardware, Work, decide_hardware, read_bytes


class EmulatedCuda:
    """A machine with one GPU, as far as torch is asked about it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool = True, free: int = 10 << 30) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bfloat16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2 * free))


@pytest.mark.parametrize(
    ("work", "bfloat16", "expected"),
    [
        ("training", True, "bf16"), ("training", False, "fp16"), ("inference", True, "bf16"), ("inference", False, "fp16"),
        ("published", True, "fp16"), ("published", False, "fp16"),
    ],
)  # fmt: skip
def test_automatic_precision_on_cuda(monkeypatch: pytest.MonkeyPatch, work: Work, bfloat16: bool, expected: str) -> None:
    EmulatedCuda(monkeypatch, bfloat16=bfloat16)
    found = decide_hardware(work=work, memory="4GiB")
    assert found == Hardware("cuda", expected, 4 << 30, int(0.8 * (10 << 30)))  # type: ignore[arg-type]
    assert found == decide_hardware("cuda", work=work, memory="4GiB")  # `auto` and the device by name are one decision
    assert decide_hardware("auto", "fp32", work=work).precision == "fp32"
    assert decide_hardware("cpu", work=work).device_memory_bytes is None


@pytest.mark.parametrize("multiplies", [True, False])
def test_automatic_precision_elsewhere(monkeypatch: pytest.MonkeyPatch, multiplies: bool) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: multiplies)
    half = "bf16" if multiplies else "fp32"
    assert [decide_hardware("cpu", work=w).precision for w in ("training", "inference", "published")] == ["fp32", half, "fp32"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = decide_hardware(work="inference")
    assert (found.device, found.precision, found.device_memory_bytes) == ("mps", "fp32", None)  # it shares the host's memory


def test_wrong_choices_are_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda', which is not on this machine"):
        decide_hardware("cuda", work="training")
    with pytest.raises(InputError, match="'fp16' on the processor"):
        decide_hardware("cpu", "fp16", work="training")
    assert decide_hardware("cpu", "fp16", work="inference").half
    with pytest.raises(InputError, match="a size such as 6GiB"):
        decide_hardware("cpu", work="training", memory="much")
    assert read_bytes("1.5 MB") == 1_500_000


def test_workers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Hardware("cuda", "bf16", 800, 400)
    assert whole.shared_by(4) == replace(whole, memory_bytes=200, device_memory_bytes=100)
    assert whole.shared_by(4, device_too=False) == replace(whole, memory_bytes=200)
    assert Hardware("cpu", "fp32", 800).shared_by(2) == Hardware("cpu", "fp32", 400)


def test_a_machine_without_a_driver_is_known_without_torch() -> None:
    code = (
        "import sys; from medlore.runs import hardware; hardware._DRIVERS = (); "
        "print(hardware.decide_hardware(work='inference', memory='1GiB').device, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["cpu", "False"]


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    import nibabel as nib

    from small_segmenter import write_small_pack

    pack = write_small_pack(tmp_path / "pack", roi_size=(32, 32, 16), experts=False)
    array = np.random.default_rng(0).normal(50, 60, (40, 36, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 3, 1])), tmp_path / "ct.nii.gz")
    return {"model": str(pack), "image": tmp_path / "ct.nii.gz", "labels": ["liver"], "modality": "ct", "out": tmp_path / "o"}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_cuda_machine_plans_what_it_runs(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], device: str) -> None:
    """`--device auto` used to plan full precision for the host and run in half precision on the GPU; `--dry-run` planned for the CPU."""
    from medlore.runs.settings_file import read_settings
    from medlore.segmenting.cohort import hardware_of, load_model, plan_cases
    from medlore.segmenting.settings import SegmentSettings

    EmulatedCuda(monkeypatch)
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: False)
    settings = read_settings(SegmentSettings, device=device, memory="4GiB", **case)
    dry = plan_cases(settings)
    assert dry["hardware"] == {"device": "cuda", "precision": "bf16", "memory_bytes": 4 << 30, "device_memory_bytes": int(0.8 * (10 << 30))}
    model = load_model(settings)
    assert model.hardware == hardware_of(settings)
    assert model.planner.rules("ct").bytes_per_number == 2
    from medlore.data.volumes.preparation import read_volume
    from medlore.segmenting.labels import route_labels

    plan = model.plan(read_volume(case["image"]), route_labels(model.facts, ["liver"], "ct"))
    assert plan.record() == dry["cases"][0]["plan"]
    assert plan.device is not None
    halves = load_model(read_settings(SegmentSettings, device=device, memory="4GiB", workers=2, **case)).hardware
    assert halves.device_memory_bytes == int(0.8 * (10 << 30)) // 2


def test_a_case_is_planned_once_and_that_plan_is_executed(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    from medlore.runs.settings_file import read_settings
    from medlore.segmenting import planner
    from medlore.segmenting.cohort import Silence, segment_cases
    from medlore.segmenting.settings import SegmentSettings

    made: list[Any] = []
    plan_case = planner.plan_case
    monkeypatch.setattr(planner, "plan_case", lambda *a, **k: made.append(plan_case(*a, **k)) or made[-1])
    planned: list[Any] = []

    class Watcher(Silence):
        def plan(self, name: str, plan: Any) -> None:
            planned.append(plan)

    settings = read_settings(SegmentSettings, device="cpu", precision="fp32", picture=False, **case)
    assert segment_cases(settings, watcher=Watcher())["counts"]["done"] == 1
    assert len(made) == 1
    assert planned == made
    from medlore.files import read_json

    assert read_json(case["out"] / "ct" / "case.json")["plan"] == made[0].record()
