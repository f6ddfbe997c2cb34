"""`medlore finetune PACK --cases five.jsonl`: a segmenter learns a structure or a scanner from about five masks.

Ranks of the convolutions come from the stable rank of the pack's own merged weights; beside them stand one rank of equal cost,
tuning of all weights, and training from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from medlore.assets import PREFIX
from medlore.data.volumes.cases import read_cases
from medlore.decomposing.segmenters.cohort import Cohort
from medlore.decomposing.segmenters.context import Narrator, NetworkJob, StudyContext, hash_of, open_context, silent
from medlore.decomposing.segmenters.few_shot_settings import RATES, FewShotSettings
from medlore.decomposing.segmenters.network import PromptedSegmenter, new_prompts
from medlore.decomposing.segmenters.packs import in_type
from medlore.decomposing.segmenters.settings import (
    DEFAULT_PREPROCESSING,
    DataSettings,
    ScheduleSettings,
    SegmentationSettings,
    SegmenterLossSettings,
    SegmenterStudentSettings,
    SegmenterTeacherSettings,
    SizeSettings,
)
from medlore.decomposing.segmenters.table import measure_network
from medlore.decomposing.stored_weights import as_stored
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.layers.experts.surgery import install_experts
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter, write_segmenter_pack
from medlore.models.segmenter.experts import collect_weights
from medlore.models.segmenter.network import Segmenter, expert_targets
from medlore.models.segmenter.prompts import PromptTable
from medlore.models.segmenter.vocabulary import REGIONS, WHOLE_BODY, canonical_modality
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.plan import RankPlan
from medlore.runs.hardware import seed_everything
from medlore.runs.output_lock import refuse_held
from medlore.runs.report import Run

_NEW = "new"  # the one expert while it is trained


@dataclass(frozen=True)
class FewShotResult:
    """What few-shot tuning leaves.

    Attributes:
        pack: a plain network with the tuned prompts; `medlore segment --model` takes it.
        table: one row per label, before and after, on the test cases.
        trainable: numbers that were trained.
        plan: ranks; None for `full` and `scratch`.
    """

    pack: Path
    table: list[dict[str, Any]]
    trainable: int
    plan: RankPlan | None


def tune_segmenter(
    settings: FewShotSettings, out: str | Path, *, narrate: Narrator = silent, say: Callable[[str], None] = lambda _text: None
) -> FewShotResult:
    """Tune a segmenter on a few cases and write `OUT/pack`, `OUT/plan.json` and `OUT/report.json`; a killed run goes on.

    Args:
        settings: what to do.
        out: folder of the results.
        narrate: name of a network -> progress.
        say: hears of cases that are skipped.

    Raises:
        InputError: wrong settings, or a model that cannot be tuned.
        DataError: cases that cannot be used, or labels of several regions.
        StepError: the training diverged.
    """
    out = Path(out)
    refuse_held(out)
    bundle = _load(settings)
    context = open_context(_as_study(settings, bundle), folder=Path.cwd(), out=out, narrate=narrate, say=say)
    region = _the_region(context.cohort)
    with Run("finetune", out, settings=settings, seed=settings.seed, device=str(context.accelerator.device)) as run:
        run.add_input(settings.cases)
        run.add_input(bundle.source)
        start = _start(bundle, region)
        plan = plan_of(start, settings)
        network = _network(start, bundle, context.cohort, settings, plan)
        table = _before(context, bundle, start)
        schedule = context.settings.student
        job = NetworkJob(settings.method, schedule, context.cohort, ("student",), begins_with=hash_of(network))
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        network = _as_written(context.finish(job, network), settings).to(context.accelerator.device)
        table += measure_network(settings.method, network, context.cohort, context.windows(), context.facts)
        pack = _write(out / "pack", network, bundle, context.cohort, settings, region)
        run.add_output("pack", pack)
        if plan is not None:
            run.add_output("plan", plan.save(out / "plan.json"))
        run.results.update(
            table=table, networks=context.facts, trainable=trainable, skipped=list(context.cohort.faults), cases=context.case_counts()
        )
    return FewShotResult(pack, table, trainable, plan)


def plan_tuning(settings: FewShotSettings) -> dict[str, Any]:
    """What `tune_segmenter` would do: cases, prompts, start, ranks, and the share of numbers that are trained. Nothing is kept.

    Raises:
        InputError, DataError: as `tune_segmenter`.
    """
    bundle = _load(settings)
    with TemporaryDirectory() as folder:
        context = open_context(_as_study(settings, bundle), folder=Path.cwd(), out=Path(folder))
        region = _the_region(context.cohort)
        start = _start(bundle, region)
        plan = plan_of(start, settings)
        network = _network(start, bundle, context.cohort, settings, plan)
        whole = sum(p.numel() for p in start.parameters())
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        return {
            "settings": settings.model_dump(mode="json"),
            "device": str(context.accelerator.device),
            "region": region,
            "prompts": list(context.cohort.keys),
            "known_prompts": sorted(set(context.cohort.keys) & set(bundle.prompts.keys if bundle.prompts else ())),
            "cases": context.case_counts()["cases"],
            "skipped": list(context.cohort.faults),
            "parameters": whole,
            "trainable": trainable,
            "trainable_share": round(trainable / whole, 4),
            "learning_rate": context.settings.student.learning_rate,
            "ranks": {} if plan is None else {layer.name: layer.rank for layer in plan.layers},
        }


def _load(settings: FewShotSettings) -> SegmenterBundle:
    return load_segmenter(settings.model if settings.model.startswith(PREFIX) else Path(settings.model))


def _as_study(settings: FewShotSettings, bundle: SegmenterBundle) -> SegmentationSettings:
    """The settings that data and training are read from; preprocessing is the pack's."""
    own: dict[str, str] = dict(bundle.preprocessing.get("label_regions", {}))
    if settings.region is not None:
        known = dict.fromkeys((*REGIONS, WHOLE_BODY, *bundle.regions))
        if settings.region not in known:
            raise UnknownNameError("--region", settings.region, known)
        own |= {f"{canonical_modality(c.modality)}/{label}": settings.region for c in read_cases(settings.cases) for label in c.labels}
    if any(side % bundle.config.patch for side in settings.patch_size):
        accepted = f"multiples of the network's patch, {bundle.config.patch}"
        raise InputError("patch_size", str(settings.patch_size), accepted, "give other sides")
    rate = RATES[settings.method] if settings.learning_rate is None else settings.learning_rate
    schedule = ScheduleSettings(steps=settings.steps, batch_size=settings.batch_size, learning_rate=rate)
    sizes = SizeSettings.of(bundle.config)
    return SegmentationSettings(
        name=f"{settings.method} of {bundle.name}",
        data=(DataSettings(name="cases", cases=settings.cases.resolve(), held_out=0.0),),
        regions=own,
        patch_size=settings.patch_size,
        max_prompts=settings.max_prompts,
        teacher=SegmenterTeacherSettings(sizes=sizes),
        student=SegmenterStudentSettings(sizes=sizes, **schedule.flat()),
        patches=settings.patches,
        preprocessing={name: value for name, value in bundle.preprocessing.items() if name in DEFAULT_PREPROCESSING},
        loss=SegmenterLossSettings(distillation=0.0),
        validation_cases=0,
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        weights=settings.weights,
    )


def _the_region(cohort: Cohort) -> str:
    regions = sorted({prompt.region for prompt in cohort.prompts.values()})
    if len(regions) != 1:
        faults = sorted(f"{p.key}: {p.region}" for p in cohort.prompts.values())
        raise DataError(
            "labels", f"of {len(regions)} regions", "labels of one region", "give --region NAME, or a list a region", faults=faults
        )
    return regions[0]


def _start(bundle: SegmenterBundle, region: str) -> Segmenter:
    """A copy of the network that answers for the region now: its merged expert, or the base where there is none."""
    held = region in bundle.weights.experts if bundle.weights.experts else False
    model = Segmenter(bundle.config, dropout=0.0)
    model.load_state_dict(bundle.weights.merged(region if held else None))
    return model


def plan_of(start: Segmenter, settings: FewShotSettings) -> RankPlan | None:
    """Ranks of the 3x3x3 convolutions, at the number of parameters of the one rank."""
    if settings.method not in ("sr-lora", "lora"):
        return None
    targets = "|".join(name.replace(".", r"\.") for name in expert_targets(start.config))
    if settings.method == "lora":
        return plan_ranks(start, targets=targets, rule=f"uniform:{settings.rank}")
    return plan_ranks(start, targets=targets, budget=f"uniform:{settings.rank}")


def _network(
    start: Segmenter, bundle: SegmenterBundle, cohort: Cohort, settings: FewShotSettings, plan: RankPlan | None
) -> PromptedSegmenter:
    """The network as its training begins."""
    seed_everything(settings.seed)
    model = Segmenter(bundle.config, dropout=0.0)
    if settings.method != "scratch":
        model.load_state_dict(start.state_dict())
    if plan is not None:
        ranks = {layer.name: layer.rank for layer in plan.layers}
        install_experts(
            model, experts=[_NEW], ranks={(name, _NEW): rank for name, rank in ranks.items()}, targets=lambda name, _m: name in ranks,
            scaling=settings.scaling, base="frozen",
        )  # fmt: skip
    rows = new_prompts(len(cohort.keys), bundle.config.query_width, seed=settings.seed)
    known = set(bundle.prompts.keys) if bundle.prompts is not None and settings.method != "scratch" else set()
    for row, key in enumerate(cohort.keys):
        if key in known:
            modality, label = key.split("/", 1)
            rows[row] = bundle.queries([label], modality)[0]
    return _TunedSegmenter(model, rows, learn_prompts=True)


class _TunedSegmenter(PromptedSegmenter):
    """Every sample takes the one new expert, whatever its region is called, and where none is named (`whole body`) too."""

    def forward(self, images: Tensor, rows: Tensor, regions: Sequence[str] | None = None, *, deep: bool = False) -> list[Tensor]:
        """As the network that it is, with the new expert."""
        return super().forward(images, rows, regions or [_NEW] * len(images), deep=deep)

    def _experts(self, regions: Sequence[str] | None) -> list[str | None]:
        return [_NEW for _ in regions or ()]


def _before(context: StudyContext, bundle: SegmenterBundle, start: Segmenter) -> list[dict[str, Any]]:
    """What the pack says of the test cases as it is; nothing where it does not know the labels."""
    if bundle.prompts is None or not set(context.cohort.keys) <= set(bundle.prompts.keys):
        return []
    rows = torch.cat([bundle.queries([label], modality) for modality, label in (key.split("/", 1) for key in context.cohort.keys)])
    network = PromptedSegmenter(start, rows, learn_prompts=False).to(context.accelerator.device)
    return measure_network("before", network, context.cohort, context.windows(), context.facts)


def _as_written(network: PromptedSegmenter, settings: FewShotSettings) -> PromptedSegmenter:
    """The plain network that the pack holds: the factors are merged first and what comes out is rounded, once."""
    weights = collect_weights(network.segmenter)
    weights = weights.only(_NEW) if weights.experts else weights
    model = Segmenter(weights.config, dropout=0.0)
    model.load_state_dict(weights.base)
    plain = PromptedSegmenter(model, network.prompts.detach().cpu(), learn_prompts=False)
    as_stored(plain, settings.weights)
    return plain.eval()


def _write(path: Path, network: PromptedSegmenter, bundle: SegmenterBundle, cohort: Cohort, settings: FewShotSettings, region: str) -> Path:
    """A plain network for one region, with the prompts that were tuned: those that were not belong to the old weights."""
    weights = collect_weights(network.segmenter)
    rows = network.prompts.detach().cpu()
    table = PromptTable(cohort.keys, rows.half() if settings.weights == "fp16" else rows)
    preprocessing = {**bundle.preprocessing, "label_regions": cohort.label_regions()}
    about = {"source": bundle.source.name, "source_sha256": bundle.sha256, "settings": settings.model_dump(mode="json")}
    merged_region = None if region == WHOLE_BODY else region
    stored = in_type(weights, settings.weights)
    return write_segmenter_pack(path, stored, prompts=table, preprocessing=preprocessing, region=merged_region, about=about)
