"""What a study of a segmenter would do: cases, labels, sizes, ranks, and which networks are there already. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medlore.decomposing.segmenters.batches import region_shares
from medlore.decomposing.segmenters.cohort import check_experts_have_cases
from medlore.decomposing.segmenters.expert_ranks import choose_expert_ranks
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.study import (
    by_region,
    experts_order,
    given_teacher,
    labels_by_region,
    new_teacher,
    plain_order,
    plain_student,
    read_study,
    single_order,
    teacher_order,
    with_experts,
)
from medlore.decomposing.segmenters.table import parameters_of
from medlore.decomposing.segmenters.workshop import Order, Workshop, open_workshop
from medlore.decomposing.stored_weights import as_stored


def plan_segmenter(
    study: str | Path, out: str | Path, *, steps: int | None = None, say: Callable[[str], None] = lambda _text: None, **flags: Any
) -> dict[str, Any]:
    """Read a study and its cases (they are cached in `out`, as the run itself would) and say what would be trained.

    Args:
        study: YAML file.
        out: folder of the run; looked through for networks that are trained or begun.
        steps: of every student, in place of the study's.
        say: told of cases that are skipped.
        flags: settings that override the file.

    Raises:
        InputError: the study or its data cannot be used.
    """
    settings = read_study(study, steps=steps, **flags)
    shop = open_workshop(settings, folder=Path(study).resolve().parent, out=Path(out), say=say)
    check_experts_have_cases(shop.cohort, shop.cohort.regions)
    given = settings.teacher.source is not None
    teacher = given_teacher(shop) if given else _teacher(shop)
    facts: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "device": str(shop.accelerator.device),
        "cases": shop.case_counts(),
        "skipped": list(shop.cohort.faults),
        "labels": labels_by_region(shop.cohort),
        "patches": {region: round(share, 4) for region, share in region_shares(shop.cohort).items()},
        "networks": {},
    }
    if not given:
        facts["networks"]["teacher"] = _network(shop, teacher_order(shop), teacher, None)
    facts |= _student(shop, teacher)
    facts["networks"] |= facts.pop("students")
    return facts


def _teacher(shop: Workshop) -> PromptedSegmenter:
    """The trained one where there is one."""
    network, order = new_teacher(shop), teacher_order(shop)
    if shop.state_of(order) == "trained":
        network = shop.finish(order, network)
        as_stored(network, shop.settings.weights)
    return network


def _student(shop: Workshop, teacher: PromptedSegmenter) -> dict[str, Any]:
    settings, cohort = shop.settings, shop.cohort
    trained = settings.teacher.source is not None or shop.state_of(teacher_order(shop)) == "trained"
    orders = [plain_order(shop)] if "shared" in settings.variants else []
    orders += [single_order(shop, region) for region in cohort.regions] if "single" in settings.variants else []
    plain = plain_student(shop, teacher)
    students = {order.name: _network(shop, order, plain, teacher if trained else None) for order in orders}
    ranks = choose_expert_ranks(settings.experts, plain.segmenter.config, labels_by_region(cohort), teacher.segmenter)
    student = with_experts(shop, plain, ranks)
    names = [*(variant for variant in settings.variants if variant.startswith("experts-")), "experts"]
    for name in names:
        students[name] = _network(shop, experts_order(shop, name), student, teacher if trained else None)
    note = "" if trained or settings.experts.rule != "stable-rank" else "of an untrained teacher; they are read off the trained one"
    share = parameters_of(student)["base"] / sum(p.numel() for p in teacher.segmenter.parameters())
    return {"students": students, "ranks": by_region(ranks), "ranks_note": note, "student_share_of_teacher": round(share, 4)}


def _network(shop: Workshop, order: Order, network: PromptedSegmenter, teacher: PromptedSegmenter | None) -> dict[str, Any]:
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    told = {
        "state": shop.state_of(order, teacher),
        "identity": shop.identity(order, teacher)[:12],
        "steps": order.schedule.steps,
        "patches": order.schedule.steps * order.schedule.batch_size * order.schedule.accumulate,
        "parameters": parameters_of(network),
        "trainable": trainable,
    }
    return told | {"training_bytes": _training_bytes(network, trainable)}


def _training_bytes(network: torch.nn.Module, trainable: int) -> int:
    """Weights, gradient, two moments and the average, all in 32 bits; maps of the patches come on top."""
    return 4 * (sum(p.numel() for p in network.parameters()) + 4 * trainable)
