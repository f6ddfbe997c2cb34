"""The steps of `same_results`: command lines in the order in which users meet them, each step in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._same_inputs import write_fused
from benchmarks._same_step import Step

MEMORY = "4GiB"  # said each time: by default it is a share of what is free
METHODS = (
    "sr-lora", "lora", "rslora", "dora", "adalora", "eva", "pissa", "dylora", "melora", "moslora", "capaboost", "glora", "adapter",
    "adaptformer", "repadapter", "vpt-shallow", "vpt-deep", "ssf", "layernorm", "linear-probe", "bitfit", "partial", "full",
)  # fmt: skip
RANK_LISTS = ("swin-t", "vit-b-dino", "vit-b-in21k-readme", "vit-b-in21k", "vit-b-mae")


# ---- Ranks ----------------------------------------------------------------------------------------------------------------


def ranks(step: Step) -> None:
    """Every rule, granularity, budget and rounding; PEFT; published lists; a Swin, a DINOv2, a ResNet and a fused file."""
    vit, fused = "medlore:vit-mini", step.inputs / "fused.safetensors"
    for granularity in ("projection", "fused"):
        for rule in ("stable-rank", "uniform:8"):
            step.run(f"{rule} {granularity}", "ranks", vit, "--rule", rule, "--granularity", granularity, "--json")
    for budget in ("250000", "2%", "uniform:8"):
        step.run(f"budget {budget}", "ranks", vit, "--budget", budget, "--json")
    step.run("files", "ranks", vit, "--out", "plan.json", "--plot", "ranks.png", "--peft", "peft", "--alpha", "rslora*2")
    step.run("again from the plan", "ranks", vit, "--ranks", "plan.json", "--json")
    step.run("all parts", "ranks", vit, "--targets", "attention+mlp", "--k", "--scale", 0.5, "--min-rank", 2, "--max-rank", 40, "--json")
    step.run("proof", "ranks", fused, "--proof", "--k", "--granularity", "fused", "--alpha", 16, "--rounding", "ceil", "--json")
    step.run("given", "ranks", fused, "--ranks", step.inputs / "ranks.txt", "--out", "given.json", "--json")
    step.run("wrong weights", "ranks", fused, "--ranks", "plan.json", status=2)
    for network in ("swin", "dinov2"):
        step.run(network, "ranks", step.inputs / network, "--out", f"{network}.json", "--peft", f"{network}-peft", "--json")
        step.run(f"{network} linear", "ranks", step.inputs / network, "--targets", "all-linear", "--rounding", "floor", "--json")
    step.run("resnet", "ranks", step.inputs / "resnet", "--targets", "conv", "--out", "resnet.json", "--json")
    step.run("swin fused", "ranks", step.inputs / "swin", "--granularity", "fused", "--budget", "uniform:4", "--json")
    blocks = write_fused(step.folder / "twelve.safetensors", blocks=12, width=192)
    for name in RANK_LISTS:
        step.run(f"list {name}", "ranks", blocks, "--ranks", f"medlore:rank-lists/{name}", "--json")
    step.run("list of other depth", "ranks", vit, "--ranks", "medlore:rank-lists/vit-b-dino", status=2)


def demo(step: Step) -> None:
    """The demo at its defaults: numbers, plan, masks."""
    step.run("demo", "demo", "--out", "demo", "--json")


# ---- Tuning ---------------------------------------------------------------------------------------------------------------

_TUNE = ("--batch-size", 6, "--precision", "fp32", "--device", "cpu", "--json")


def tune(step: Step, label: str, *arguments: Any, data: str = "mednist.zip", status: int = 0) -> None:
    """One tuning run into the folder of its label."""
    given = ["finetune", "--data", step.inputs / data, "--out", label, *_TUNE, *arguments]
    defaults = {"--epochs": 2, "--shots": 2}
    step.run(label, *given, *(part for flag, value in defaults.items() if flag not in arguments for part in (flag, value)), status=status)


def tune_methods(step: Step) -> None:
    """Every method, with validation images."""
    for method in METHODS:
        tune(step, method, "--method", method, "--seed", 1)


def tune_last_epoch(step: Step) -> None:
    """Some methods without validation images, and without weight decay."""
    for method in ("sr-lora", "ssf", "vpt-deep", "partial", "full", "linear-probe"):
        tune(step, method, "--method", method, "--test-data", step.inputs / "judge", data="pool")
        tune(step, f"{method}-no-decay", "--method", method, "--test-data", step.inputs / "judge", "--weight-decay", 0, data="pool")


def tune_options(step: Step) -> None:
    """Ranks, partial updates, masks over components, other networks and data; then `evaluate`, `predict`, `view` and `info`."""
    for mode in ("nested", "single"):
        tune(step, f"sr-lora-{mode}", "--partial-update", mode)
    tune(step, "dylora-nested", "--method", "dylora", "--partial-update", "nested")
    tune(step, "shapley", "--component-masks", "shapley", "--epochs", 3)
    tune(step, "fused", "--granularity", "fused", "--budget", "1%", "--alpha", "rslora*2")
    tune(step, "equal", "--method", "lora", "--rank", "equal", "--scale", 0.5, "--dropout", 0.1)
    tune(step, "all-linear", "--method", "lora", "--rank", 4, "--targets", "all-linear", "--no-augment", "--patience", 1, "--epochs", 4)
    tune(step, "swin", "--model", step.inputs / "swin", "--track-stable-rank", "--lr", 0.01)
    tune(step, "swin-adapter", "--model", step.inputs / "swin", "--method", "adapter", "--bottleneck", 4)
    tune(step, "dinov2", "--model", step.inputs / "dinov2", "--method", "dora", "--rank", 2)
    tune(step, "resnet", "--model", step.inputs / "resnet", "--image-size", 32, "--targets", "conv", "--lr", 0.01)
    tune(step, "chest", "--shots", 3, "--per", "group", "--draw", 2, "--data-seed", 5, "--flip", "horizontal", data="chest.npz")
    tune(step, "lungs", "--shots", 4, "--validation-shots", "all", "--image-size", 32, data="lungs.npz")
    step.run("dry run", "finetune", "--data", step.inputs / "mednist.zip", "--shots", 2, "--method", "adaptformer", "--dry-run", "--json")
    step.run("finished", "finetune", "--data", step.inputs / "mednist.zip", "--out", "swin", status=2)
    step.run("evaluate", "evaluate", "sr-lora-nested", "--data", step.inputs / "judge", "--out", "evaluated", "--bootstrap", 200, "--json")
    step.run("evaluate chest", "evaluate", "chest", "--data", step.inputs / "chest.npz", "--out", "evaluated-chest", "--json")
    for name in ("sr-lora-nested", "swin-adapter", "chest"):
        precise = ("--precision", "fp32", "--json")
        step.run(f"predict {name}", "predict", name, step.inputs / "unlabelled", "--out", f"predicted-{name}.csv", *precise)
    step.run("view", "view", "swin", "--out", "swin.html")
    for name in ("swin", "swin/adapter", "swin/plan.json"):
        step.run(f"info {name}", "info", name, "--json")


def tune_resume(step: Step) -> None:
    """A run that is killed at its first checkpoint and gone on with; the one that was not broken stands beside it."""
    for method in ("sr-lora", "adalora"):
        given = ("--method", method, "--epochs", 8, "--data", step.inputs / "mednist.zip", "--shots", 2, *_TUNE)
        step.run(f"{method} whole", "finetune", *given, "--out", f"{method}-whole")
        step.run(f"{method} killed", "finetune", *given, "--out", f"{method}-resumed", kill=True)
        step.run(f"{method} resumed", "finetune", *given, "--out", f"{method}-resumed", "--resume")


# ---- Decomposition --------------------------------------------------------------------------------------------------------


def decompose(step: Step, study: str = "classifier") -> None:
    """A study of small classifiers with all variants, its dry run, and each form of export."""
    step.run("dry run", "decompose", step.inputs / f"{study}.yaml", "--out", "dry", "--dry-run", "--json")
    step.run("study", "decompose", step.inputs / f"{study}.yaml", "--out", "out", "--json")
    step.run("info", "info", "out/pack", "--json")


def decompose_as_is(step: Step) -> None:
    """The study with its weight decay; the pack in each form."""
    decompose(step)
    for form in ("safetensors", "onnx", "torch-export", "peft"):
        step.run(f"export {form}", "export", "out/pack", "--expert", "lungs", "--format", form, "--out", f"export-{form}", "--json")
    step.run("export base", "export", "out/pack", "--expert", "base", "--out", "export-base", "--json")
    tune(step, "tuned", "--model", "export-base", "--targets", "conv", "--lr", 0.01)


def decompose_no_decay(step: Step) -> None:
    """The study without weight decay, judged at its end alone."""
    decompose(step, "classifier-no-decay")


def decompose_resume(step: Step) -> None:
    """Killed at the first checkpoint and run again; and a short run in bf16."""
    study = step.inputs / "classifier.yaml"
    step.run("killed", "decompose", study, "--out", "out", kill=True)
    step.run("again", "decompose", study, "--out", "out", "--json")
    step.run("bf16", "decompose", step.inputs / "classifier-bf16.yaml", "--out", "bf16", "--steps", 3, "--seed", 4, "--json")


# ---- Segmenters -----------------------------------------------------------------------------------------------------------


def segmenter(step: Step, study: str = "segmenter") -> None:
    """Teacher, student, experts, an expert that is added, and few-shot tuning of the pack, by each of its methods."""
    file = step.inputs / f"{study}.yaml"
    step.run("dry run", "decompose", file, "--out", "dry", "--dry-run", "--json")
    step.run("study", "decompose", file, "--out", "out", "--json")
    added = step.inputs / f"{study.replace('segmenter', 'segmenter-added')}.yaml"
    step.run("added expert", "decompose", added, "--out", "added", "--add-expert", "thorax", "--pack", "out/pack", "--json")
    step.run("info", "info", "added/pack-thorax", "--json")


def segmenter_as_is(step: Step) -> None:
    """The study with its weight decay; few-shot tuning; use of the packs."""
    segmenter(step)
    cases = step.inputs / "volumes" / "few.jsonl"
    few = ("--cases", cases, "--steps", 3, "--device", "cpu", "--precision", "fp32", "--json")
    for method in ("sr-lora", "lora", "full", "scratch"):
        step.run(f"tune {method}", "finetune", "out/pack", *few, "--method", method, "--out", f"tuned-{method}")
    step.run("tune dry run", "finetune", "out/pack", *few, "--dry-run")
    step.run("export brain", "export", "out/pack", "--expert", "brain", "--out", "brain", "--json")
    labels, image = "hippocampus,anterior hippocampus", step.inputs / "volumes" / "hippocampus_014.nii.gz"
    for name, model in (("pack", "out/pack"), ("tuned", "tuned-sr-lora/pack"), ("brain", "brain"), ("added", "added/pack-thorax")):
        segment(step, f"segment {name}", "--image", image, "--labels", labels, "--modality", "mri", "--model", model)


def segmenter_no_decay(step: Step) -> None:
    """The study without weight decay, validated at its end alone."""
    segmenter(step, "segmenter-no-decay")


def segmenter_resume(step: Step) -> None:
    """Teacher alone, killed at the first checkpoint, and the same command without `--only`; few-shot tuning killed and run again."""
    study = step.inputs / "segmenter.yaml"
    step.run("killed", "decompose", study, "--out", "out", "--only", "teacher", kill=True)
    step.run("teacher", "decompose", study, "--out", "out", "--only", "teacher", "--json")
    step.run("again", "decompose", study, "--out", "out", "--json")


# ---- Segmenting -----------------------------------------------------------------------------------------------------------


def segment(step: Step, label: str, *arguments: Any, status: int = 0) -> None:
    """One run of `segment` into the folder of its label."""
    memory = () if "--memory" in arguments else ("--memory", MEMORY)
    model = () if "--model" in arguments else ("--model", "medlore:seg-mini")
    given = ("--out", label.replace(" ", "-"), "--no-amp", "--device", "cpu", *model, *memory, "--json")
    step.run(label, "segment", *arguments, *given, status=status)


def segment_volumes(step: Step) -> None:
    """Real volumes of several modalities and grids, one label and many, settings of memory and windows, DICOM."""
    place = step.inputs / "volumes"
    head = ("--image", place / "head.nii.gz", "--modality", "mri", "--labels")
    segment(step, "head", *head, "grey matter,white matter,hippocampus,thalamus,brainstem,cerebellum")
    segment(step, "head one", *head, "hippocampus", "--no-picture", "--no-image-copy")
    segment(step, "head network alone", *head, "grey matter,white matter", "--no-redraw-tissues", "--overlap", 0)
    segment(step, "head processed", *head, "hippocampus", "--grid", "processed", "--resample", "nearest")
    ct = ("--image", place / "ct_small.nii.gz", "--modality", "ct", "--labels")
    segment(step, "ct", *ct, "liver,spleen,lung,vertebrae,aorta,colon", "--overlap-rule", "given")
    segment(step, "ct little memory", *ct, "liver,spleen,lung,vertebrae,aorta,colon", "--memory", "700MiB", "--max-queries", 2)
    segment(step, "ct windows", *ct, "liver,lung", "--roi-size", "64,64,32", "--sw-batch-size", 2)
    segment(step, "ct forced", *ct, "lung", "--region", "abdomen")
    segment(step, "ct published", *ct, "liver", "--published")
    segment(step, "mr", "--image", place / "mr_small.nii.gz", "--modality", "t1", "--labels", "liver,kidney")
    step.run("plan", "segment", place / "cohort.jsonl", "--model", "medlore:seg-mini", "--out", "none", "--memory", MEMORY,
             "--no-amp", "--dry-run", "--json", status=1)  # fmt: skip
    segment(step, "dicom", step.inputs / "dicom", "--labels", "liver,lung", "--dicom-seg")


def segment_cohort(step: Step) -> None:
    """A list with a missing image: by one worker, by two, and once more over its own results; then `view` and `info`."""
    cases = step.inputs / "volumes" / "cohort.jsonl"
    segment(step, "one worker", cases, status=1)
    segment(step, "two workers", cases, "--workers", 2, status=1)
    step.run("again", "segment", cases, "--model", "medlore:seg-mini", "--out", "one-worker", "--no-amp", "--device", "cpu",
             "--memory", MEMORY, "--json", status=1)  # fmt: skip
    step.run("view", "view", "one-worker", "--out", "page.html")
    step.run("info", "info", "one-worker", "--json")
    step.run("labels", "info", "--labels", "medlore:seg-mini", "--modality", "mri", "--json")


def evaluate_masks(step: Step) -> None:
    """Masks of hippocampi, and how far they are from the truth."""
    cases = step.inputs / "volumes" / "truth.jsonl"
    segment(step, "masks", cases, "--no-picture")
    step.run("evaluate", "evaluate", "--pred", "masks", "--truth", cases, "--out", "measured", "--json")
    step.run("tolerance", "evaluate", "--pred", "masks", "--truth", cases, "--tolerance", 2, "--json")


# ---- Studies, pre-training, older files -----------------------------------------------------------------------------------


def study(step: Step) -> None:
    """A grid of eight cells and more, its plan, one cell again."""
    file = step.inputs / "grid.yaml"
    step.run("plan", "study", file, "--out", "grid", "--dry-run", "--json")
    step.run("grid", "study", file, "--out", "grid", "--workers", 0, "--json")
    step.run("cell", "study", file, "--out", "grid", "--workers", 0, "--only", "method=linear-probe", "--only", "draw=1", "--json")


PRETRAIN_MODULES = ("medlore.recipes.pretrain", "medlore.pretraining", "medlore.training.pretrain", "medlore.pretrain")
PRETRAIN_FILES = ("*/pretrain.py", "*/pretrain*/__main__.py", "*/pretrain_*.py", "*/*/pretrain.py")


def pretrain_program(step: Step) -> str:
    """Where pre-training stands in this version: a module of the package, or a file beside it.

    Raises:
        FileNotFoundError: nowhere that is known; name it with --pretrain.
    """
    if step.pretrain is not None:
        return step.pretrain
    for name in PRETRAIN_MODULES:
        place = step.programs.joinpath(*name.split(".")[1:])
        if place.with_suffix(".py").is_file() or (place / "__main__.py").is_file():
            return name
    root = step.programs.parents[1]
    found = [
        path for pattern in PRETRAIN_FILES for path in sorted(root.glob(pattern)) if "test" not in path.as_posix().removeprefix(str(root))
    ]
    if not found:
        raise FileNotFoundError(f"no pre-training program in {step.programs} or beside it; name it with --pretrain")
    return str(found[0])


def pretrain(step: Step) -> None:
    """A few steps on real images, with weight decay and without."""
    program = pretrain_program(step)
    for study, out in (("pretraining", "run"), ("pretraining-no-decay", "run-no-decay")):
        step.run(out, step.inputs / f"{study}.yaml", "--data", step.inputs, "--out", out, module=program)
    step.run("ranks", "ranks", "run/backbone", "--json")


def make_fixtures(step: Step) -> None:
    """Files of this version for a later one to read: packs (also with the number of format 1), a tuned run, a plan."""
    place, work = step.fixtures, step.work
    if (place / "done").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    sources = {
        "classifier-2": work / "decompose" / "out" / "pack",
        "segmenter-2": work / "segmenter" / "out" / "pack",
        "tuned": work / "tune-options" / "sr-lora-nested",
        "tuned-modules": work / "tune-methods" / "ssf",
        "case": work / "segmenter" / "segment-pack" / "hippocampus_014",
    }
    missing = [name for name, source in sources.items() if not source.is_dir()]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)}: run the steps decompose, segmenter, tune-options and tune-methods before")
    for name, source in sources.items():
        shutil.copytree(source, place / name)
    for kind in ("classifier", "segmenter"):
        shutil.copytree(place / f"{kind}-2", place / f"{kind}-1")
        manifest = place / f"{kind}-1" / "manifest.json"
        manifest.write_text(manifest.read_text(encoding="utf-8").replace("expert-pack/2", "expert-pack/1"), encoding="utf-8")
    shutil.copyfile(work / "ranks" / "plan.json", place / "plan.json")
    (place / "done").write_text("whole\n", encoding="utf-8")


def old_files(step: Step) -> None:
    """Packs of format 1 and 2, tuned models, a plan and a case that an older version wrote."""
    make_fixtures(step)
    old, image = step.fixtures, step.inputs / "volumes" / "hippocampus_019.nii.gz"
    for number in (1, 2):
        step.run(f"info classifier {number}", "info", old / f"classifier-{number}", "--json")
        step.run(f"export {number}", "export", old / f"classifier-{number}", "--expert", "kind", "--out", f"kind-{number}", "--json")
        step.run(f"info segmenter {number}", "info", old / f"segmenter-{number}", "--json")
        segment(step, f"segment {number}", "--image", image, "--labels", "hippocampus,anterior hippocampus", "--modality", "mri",
                "--model", old / f"segmenter-{number}")  # fmt: skip
    for name in ("tuned", "tuned-modules"):
        step.run(
            f"predict {name}", "predict", old / name, step.inputs / "unlabelled", "--out", f"{name}.csv", "--precision", "fp32", "--json"
        )
    step.run("evaluate", "evaluate", old / "tuned", "--data", step.inputs / "judge", "--bootstrap", 100, "--out", "evaluated", "--json")
    step.run("plan", "ranks", "medlore:vit-mini", "--ranks", old / "plan.json", "--json")
    tune(step, "tuned-by-plan", "--plan", old / "plan.json")
    for name in ("tuned", "case", "plan.json"):
        step.run(f"info {name}", "info", old / name, "--json")
    step.run("view", "view", old / "case", "--out", "case.html")


STEPS: dict[str, Callable[[Step], None]] = {
    "ranks": ranks,
    "demo": demo,
    "tune-methods": tune_methods,
    "tune-last-epoch": tune_last_epoch,
    "tune-options": tune_options,
    "tune-resume": tune_resume,
    "decompose": decompose_as_is,
    "decompose-no-decay": decompose_no_decay,
    "decompose-resume": decompose_resume,
    "segmenter": segmenter_as_is,
    "segmenter-no-decay": segmenter_no_decay,
    "segmenter-resume": segmenter_resume,
    "segment": segment_volumes,
    "segment-cohort": segment_cohort,
    "evaluate-masks": evaluate_masks,
    "study": study,
    "pretrain": pretrain,
    "old-files": old_files,
}


def chosen_steps(names: Sequence[str]) -> list[str]:
    """All steps, or those that are named, in their own order."""
    strange = [name for name in names if name not in STEPS]
    if strange:
        raise SystemExit(f"--only {', '.join(strange)}: no such step; there are {', '.join(STEPS)}")
    return [name for name in STEPS if not names or name in names]
