"""Small fixed inputs for `same_results`: parts of the real sets of `--data`, networks of fixed random weights, and study files.

Nothing here imports medlore, so that two versions of it get the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MEDNIST_IMAGES = 20  # a class
_FIRST_TEST = 14  # from here on they are test images where a set of its own is wanted
_UID = "1.2.826.0.1.3680043.8.498.1"
VOLUMES = {
    "ct_small": "totalseg/example_ct_sm", "mr_small": "totalseg/example_mr_sm", "cord": "sct/t2_t2", "thick": "sct/t2s_t2s",
    "head": "spm/T1",
}  # fmt: skip
HIPPOCAMPI = ("003", "007", "008", "011", "014", "019")
CT_LABELS = {"liver": [5], "spleen": [1]}
CT_BOXES = ((28, 78, 25, 75, 74, 106), (24, 74, 23, 73, 78, 110), (30, 80, 27, 77, 76, 108), (26, 76, 24, 74, 80, 112))
HIPPOCAMPUS_LABELS = {"hippocampus": [1, 2], "anterior hippocampus": [1]}
SPLITS = ("train", "train", "validation", "test", "train", "train")


def make_inputs(folder: Path, data: Path) -> None:
    """Write everything below `folder`, once.

    Args:
        folder: of the inputs.
        data: the folder of the real sets.
    """
    done = folder / "done"
    if done.is_file():
        _studies(folder)  # texts, which cost nothing
        return
    if not data.is_dir():
        raise SystemExit(f"--data {data}: no such folder; the runs take parts of the real sets, give their place")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _images(folder, data)
    _networks(folder)
    _volumes(folder, data)
    write_dicom(folder / "dicom", folder / "volumes" / "ct_small.nii.gz")
    _studies(folder)
    done.write_text("whole\n", encoding="utf-8")


def _images(folder: Path, data: Path) -> None:
    with zipfile.ZipFile(data / "mednist.zip") as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))
        kept: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda row: row["file"]):
            names = kept.setdefault(row["label"], [])
            if len(names) < _MEDNIST_IMAGES:
                names.append(row["file"])
        images = {name: archive.read(name) for names in kept.values() for name in names}
    _zip(folder / "mednist.zip", {label: {name: images[name] for name in names} for label, names in kept.items()})
    for label, names in kept.items():
        for number, name in enumerate(names):
            part = "pool" if number < 2 else "judge" if number >= _FIRST_TEST + 3 else "unlabelled" if number == 2 else None
            if part is not None:
                place = folder / part / (label if part != "unlabelled" else "") / Path(name).name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(images[name])
    chest = np.load(data / "nih_cxr14_64.npz")
    first = slice(0, 160)
    patients = np.array([str(name).split("_")[0] for name in chest["ids"][first]])
    np.savez(folder / "chest.npz", images=chest["images"][first], labels=chest["labels"][first], classes=chest["classes"],
             ids=chest["ids"][first], patients=patients)  # fmt: skip
    lungs, cut = np.load(data / "pneumoniamnist_modified.npz"), {"train": 60, "val": 24, "test": 40}
    np.savez(
        folder / "lungs.npz", **{f"{part}_{kind}": lungs[f"{part}_{kind}"][:n] for part, n in cut.items() for kind in ("images", "labels")}
    )


def _zip(path: Path, classes: dict[str, dict[str, bytes]]) -> None:
    """A labelled archive of fixed times."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "label"])
    with zipfile.ZipFile(path, "w") as archive:
        for label, images in classes.items():
            for name, content in images.items():
                table.writerow([name, label])
                archive.writestr(zipfile.ZipInfo(name), content)
        archive.writestr(zipfile.ZipInfo("labels.csv"), text.getvalue())


def _networks(folder: Path) -> None:
    """A Swin, a DINOv2 and a ResNet of transformers, and a fused ViT under timm's names, all with fixed random weights."""
    import torch
    import transformers

    labels = {"num_labels": 2}
    made: dict[str, tuple[Any, Any]] = {
        "swin": (transformers.SwinForImageClassification, transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4, **labels)),
        "dinov2": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7, mlp_ratio=2, **labels)),
        "resnet": (transformers.ResNetForImageClassification, transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **labels)),
    }  # fmt: skip
    for number, (name, (kind, config)) in enumerate(made.items()):
        torch.manual_seed(number)
        model = kind(config)
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # a spectrum that decays, so that the ranks differ
                decay = torch.arange(1, parameter.shape[-1] + 1) ** -0.4
                parameter.data = torch.randn(parameter.shape, generator=generator) * decay * 0.3
        model.save_pretrained(folder / name)
    write_fused(folder / "fused.safetensors", blocks=3, width=64)
    (folder / "ranks.txt").write_text("[[9, 10], [25, 31], [4, 5]]\n", encoding="utf-8")


def write_fused(path: Path, *, blocks: int, width: int) -> Path:
    """Attention weights of a ViT under timm's names, fused, with spectra that decay."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    decay = torch.arange(1, width + 1) ** -0.7
    state = {
        f"blocks.{i}.attn.{name}.weight": torch.randn(rows, width, generator=generator) * decay
        for i in range(blocks)
        for name, rows in (("qkv", 3 * width), ("proj", width))
    }
    save_file(state, path)
    return path


def _volumes(folder: Path, data: Path) -> None:
    import nibabel

    place = folder / "volumes"
    place.mkdir()
    for name, source in VOLUMES.items():
        shutil.copyfile(data / f"{source}.nii.gz", place / f"{name}.nii.gz")
    brain = []
    for number, patient in enumerate(HIPPOCAMPI):
        for suffix, kind in (("", "images"), ("_mask", "labels")):
            shutil.copyfile(data / "hippocampus" / kind / f"hippocampus_{patient}.nii.gz", place / f"hippocampus_{patient}{suffix}.nii.gz")
        brain.append(_line(f"hippocampus_{patient}", HIPPOCAMPUS_LABELS, "mri", SPLITS[number]))
    image: Any = nibabel.load(data / "totalseg" / "example_ct.nii.gz")
    labels: Any = nibabel.load(data / "totalseg" / "example_seg_fast_force_split.nii.gz")
    belly = []
    for number, (a, b, c, d, e, f) in enumerate(CT_BOXES):
        for suffix, whole in (("", image), ("_mask", labels)):
            part = whole.slicer[a:b, c:d, e:f]
            nibabel.save(
                nibabel.Nifti1Image(np.asarray(part.dataobj).astype(np.int16), part.affine), place / f"belly{number}{suffix}.nii.gz"
            )
        belly.append(_line(f"belly{number}", CT_LABELS, "ct", SPLITS[number]))
    write_lines(place / "brain.jsonl", brain[:4])
    write_lines(place / "belly.jsonl", belly)
    write_lines(place / "few.jsonl", [brain[0], brain[1], brain[3]])
    write_lines(place / "truth.jsonl", brain[2:6])
    for line in belly:  # labels of another region, for an expert that is added: the same voxels under another name
        line["label"], line["mask_values"] = ["lung"], {"lung": [5]}
    write_lines(place / "added.jsonl", belly)
    common = {"modality": "mri"}
    write_lines(
        place / "cohort.jsonl",
        [
            {"image": "cord.nii.gz", "label": ["spinal cord"], **common},
            {"image": "thick.nii.gz", "label": ["spinal cord"], **common},
            {"image": "missing.nii.gz", "label": ["hippocampus"], **common},
            {"image": "hippocampus_003.nii.gz", "label": ["hippocampus", "anterior hippocampus"], **common},
            {"image": "ct_small.nii.gz", "label": ["liver", "lung", "vertebrae"], "modality": "ct"},
        ],
    )


def _line(name: str, labels: dict[str, list[int]], modality: str, split: str) -> dict[str, Any]:
    line = {"image": f"{name}.nii.gz", "mask": f"{name}_mask.nii.gz", "label": list(labels), "mask_values": labels}
    return {**line, "modality": modality, "patient": name, "split": split}


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A jsonl."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_dicom(folder: Path, volume: Path) -> None:
    """A CT volume as a DICOM series with fixed identifiers; `volume` is RAS with equal sides of its voxels."""
    import nibabel
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir()
    image: Any = nibabel.load(volume)
    stored = (np.asarray(image.dataobj).astype(np.int32) + 1024).clip(0, 4095).astype(np.uint16)
    across, down, thick = (float(size) for size in image.header.get_zooms())
    corner = image.affine @ [0, stored.shape[1] - 1, 0, 1]  # rows run to the back, so the first one is the last of RAS
    for z in range(stored.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"{_UID}.3.{z + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d: Any = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, f"{_UID}.3.{z + 1}"
        d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID = f"{_UID}.2", f"{_UID}.1", f"{_UID}.4"
        d.Modality, d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = "CT", "Nobody", "0", "", ""
        d.StudyDate, d.StudyTime, d.AccessionNumber, d.StudyID, d.SeriesNumber, d.ReferringPhysicianName = "", "", "", "1", 1, ""
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = stored.shape[1], stored.shape[0], 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.RescaleSlope, d.RescaleIntercept, d.InstanceNumber = 1, -1024, z + 1
        d.PixelSpacing, d.SliceThickness, d.ImageOrientationPatient = [down, across], thick, [-1, 0, 0, 0, 1, 0]
        d.ImagePositionPatient = [float(-corner[0]), float(-corner[1]), float(corner[2] + thick * z)]
        d.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
        d.PixelData = np.ascontiguousarray(stored[:, ::-1, z].T).tobytes()
        d.save_as(folder / f"{z:03d}.dcm", enforce_file_format=True)


# ---- Study files ----------------------------------------------------------------------------------------------------------

CLASSIFIER = """\
name: small
image_size: 32
tasks:
  - {name: kind, data: mednist.zip, classes: [AbdomenCT, HeadCT, Hand], held_out: 0.2, licence: CC BY-SA 4.0}
  - {name: lungs, data: lungs.npz, train: train, validation: val, test: test, validation_limit: 16, licence: CC BY 4.0}
  - {name: chest, data: chest.npz, held_out: 0.2, limit: 60, licence: NIH ChestX-ray14}
teacher: {source: shufflenet, steps: 4}
ranks: {rule: task-size, rank: 3}
variants: [teacher, experts, shared, shared-distilled, single, experts-uniform, experts-stable-rank]
steps: 6
batch_size: 12
evaluate_every: 2
device: cpu
precision: fp32
"""

_SIZES = (
    "{features: [4, 8, 8], patch: 4, query_width: 16, projection_width: 16, mask_width: 16, feedforward: 16, heads: 2, decoder_layers: 1%s}"
)
SEGMENTER = f"""\
kind: segmenter
name: small
data:
  - {{name: brain, cases: volumes/brain.jsonl, licence: CC BY-SA 4.0}}
  - {{name: belly, cases: volumes/belly.jsonl, licence: Apache-2.0, note: one patient}}
patch_size: [16, 16, 16]
max_prompts: 3
preprocessing: {{spacing_mm: {{ct: [3, 3, 3], mri: [1, 1, 1]}}, roi_size: [32, 32, 32]}}
teacher: {{steps: 4, batch_size: 2, accumulate: 2, learning_rate: 3.0e-3, ema: 0.9, sizes: {_SIZES % ", deep_widths: [8]"}}}
student: {{steps: 4, batch_size: 2, learning_rate: 3.0e-3, sizes: {_SIZES % ""}}}
experts: {{rule: stable-rank, rank: 2}}
variants: [teacher, shared, single, experts, experts-uniform]
validation_cases: 1
validate_every: 2
checkpoint_minutes: 0
device: cpu
precision: fp32
"""

GRID = """\
name: grid
data:
  - {name: digits, data: "sklearn:digits", test_limit: 60}
  - {name: chest, data: chest.npz, test_limit: 40}
shots: [1]
draws: 2
methods:
  - sr-lora
  - linear-probe
  - {method: lora, grid: {rank: [2, 4]}}
tuning: {rate_factors: [1, 3]}
settings: {epochs: 1, batch_size: 8, device: cpu, precision: fp32}
"""

PRETRAINING = """\
archives: [mednist.zip]
skip_classes: [Hand]
image_size: 32
width: 32
depth: 2
heads: 2
mlp_width: 48
steps: 8
batch_size: 16
kept_patches: 8
full_from: 0.5
mix_share: 0.5
"""


def _studies(folder: Path) -> None:
    """Each study as it is, and without weight decay: there the results must not change even where decay spares other tensors."""
    still = CLASSIFIER.replace("evaluate_every: 2", "evaluate_every: 100") + "weight_decay: 0\n"
    no_decay = SEGMENTER.replace("learning_rate: 3.0e-3", "learning_rate: 3.0e-3, weight_decay: 0").replace(
        "validate_every: 2", "validate_every: 0"
    )
    files = {
        "classifier": CLASSIFIER,
        "classifier-no-decay": still,
        "classifier-bf16": CLASSIFIER.replace("precision: fp32", "precision: bf16").replace(
            "variants: [teacher, experts, shared, shared-distilled, single, experts-uniform, experts-stable-rank]", "variants: [experts]"
        ),
        "segmenter": SEGMENTER,
        "segmenter-no-decay": no_decay,
        "segmenter-added": SEGMENTER.replace("volumes/belly.jsonl", "volumes/added.jsonl"),
        "segmenter-added-no-decay": no_decay.replace("volumes/belly.jsonl", "volumes/added.jsonl"),
        "grid": GRID,
        "pretraining": PRETRAINING,
        "pretraining-no-decay": PRETRAINING + "weight_decay: 0\n",
    }
    for name, text in files.items():
        place = folder / f"{name}.yaml"
        if not place.is_file() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")
