"""What a study of a segmenter would do: cases, labels, sizes, ranks, and which networks are there already. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medlore.decomposing.segmenters.batches import region_shares
from medlore.decomposing.segmenters.cohort import check_experts_have_cases
from medlore.decomposing.segmenters.context import NetworkJob, StudyContext, open_context
from medlore.decomposing.segmenters.expert_ranks import choose_expert_ranks
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.study import (
    by_region,
    experts_job,
    given_teacher,
    labels_by_region,
    new_teacher,
    plain_job,
    plain_student,
    read_study,
    single_job,
    teacher_job,
    with_experts,
)
from medlore.decomposing.segmenters.table import parameters_of
from medlore.decomposing.stored_weights import as_stored


def plan_segmenter(
    study: str | Path, out: str | Path, *, steps: int | None = None, say: Callable[[str], None] = lambda _text: None, **flags: Any
) -> dict[str, Any]:
    """Read a study and its cases (they are cached in `out`, as the run itself would) and say what would be trained.

    Args:
        study: YAML file.
        out: folder of the run; looked through for networks that are trained or begun.
        steps: of every student, in place of the study's.
        say: hears of cases that are skipped.
        flags: settings that override the file.

    Raises:
        InputError: the study or its data cannot be used.
    """
    settings = read_study(study, steps=steps, **flags)
    context = open_context(settings, folder=Path(study).resolve().parent, out=Path(out), say=say)
    check_experts_have_cases(context.cohort, context.cohort.regions)
    given = settings.teacher.source is not None
    teacher = given_teacher(context) if given else _teacher(context)
    facts: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "device": str(context.accelerator.device),
        "cases": context.case_counts(),
        "skipped": list(context.cohort.faults),
        "labels": labels_by_region(context.cohort),
        "patches": {region: round(share, 4) for region, share in region_shares(context.cohort).items()},
        "networks": {},
    }
    if not given:
        facts["networks"]["teacher"] = _network(context, teacher_job(context), teacher, None)
    facts |= _student(context, teacher)
    facts["networks"] |= facts.pop("students")
    return facts


def _teacher(context: StudyContext) -> PromptedSegmenter:
    """The trained one where there is one."""
    network, job = new_teacher(context), teacher_job(context)
    if context.state_of(job) == "trained":
        network = context.finish(job, network)
        as_stored(network, context.settings.weights)
    return network


def _student(context: StudyContext, teacher: PromptedSegmenter) -> dict[str, Any]:
    settings, cohort = context.settings, context.cohort
    trained = settings.teacher.source is not None or context.state_of(teacher_job(context)) == "trained"
    jobs = [plain_job(context)] if "shared" in settings.variants else []
    jobs += [single_job(context, region) for region in cohort.regions] if "single" in settings.variants else []
    plain = plain_student(context, teacher)
    students = {job.name: _network(context, job, plain, teacher if trained else None) for job in jobs}
    config, labels = plain.segmenter.config, labels_by_region(cohort)
    ranks = choose_expert_ranks(settings.experts, config, labels, teacher.segmenter, folder=context.study_folder)
    student = with_experts(context, plain, ranks)
    names = [*(variant for variant in settings.variants if variant.startswith("experts-")), "experts"]
    for name in names:
        students[name] = _network(context, experts_job(context, name), student, teacher if trained else None)
    note = "" if trained or settings.experts.rule != "stable-rank" else "of an untrained teacher; they are read off the trained one"
    share = parameters_of(student)["base"] / sum(p.numel() for p in teacher.segmenter.parameters())
    return {"students": students, "ranks": by_region(ranks), "ranks_note": note, "student_share_of_teacher": round(share, 4)}


def _network(context: StudyContext, job: NetworkJob, network: PromptedSegmenter, teacher: PromptedSegmenter | None) -> dict[str, Any]:
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    facts = {
        "state": context.state_of(job, teacher),
        "identity": context.identity(job, teacher)[:12],
        "steps": job.schedule.steps,
        "patches": job.schedule.steps * job.schedule.batch_size * job.schedule.accumulate,
        "parameters": parameters_of(network),
        "trainable": trainable,
    }
    return facts | {"training_bytes": _training_bytes(network, trainable)}


def _training_bytes(network: torch.nn.Module, trainable: int) -> int:
    """Weights, gradient, two moments and the average, all in 32 bits; maps of the patches come on top."""
    return 4 * (sum(p.numel() for p in network.parameters()) + 4 * trainable)
