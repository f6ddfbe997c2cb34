"""`medlore decompose --add-expert`: one more expert for a finished pack. Base, other experts and known prompts stay bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medlore.assets import PREFIX
from medlore.decomposing.segmenters.cohort import Cohort, check_experts_have_cases
from medlore.decomposing.segmenters.context import Narrator, NetworkJob, StudyContext, hash_of, open_context, silent
from medlore.decomposing.segmenters.expert_ranks import choose_expert_ranks
from medlore.decomposing.segmenters.network import PromptedSegmenter, new_prompts
from medlore.decomposing.segmenters.packs import smallest_type, without_loss
from medlore.decomposing.segmenters.settings import KNOWN_PREPROCESSING, SegmentationSettings
from medlore.decomposing.segmenters.study import SegmentationResult, measured, read_study
from medlore.errors import InputError
from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.surgery import set_trainable
from medlore.linalg.factors import factor_shapes
from medlore.models import packs
from medlore.models.segmenter.bundle import KIND, SegmenterBundle, load_segmenter, write_segmenter_pack
from medlore.models.segmenter.checkpoints import Expert, SegmenterWeights
from medlore.models.segmenter.experts import collect_weights, segmenter_with_experts
from medlore.models.segmenter.prompts import PromptTable
from medlore.models.segmenter.vocabulary import REGIONS, default_vocabulary
from medlore.runs.hardware import seed_everything
from medlore.runs.report import Run


def add_expert(
    study: str | Path,
    out: str | Path,
    *,
    region: str,
    pack: str | Path | None = None,
    steps: int | None = None,
    narrate: Narrator = silent,
    say: Callable[[str], None] = lambda _text: None,
    **flags: Any,
) -> SegmentationResult:
    """Train an expert of one region and write `OUT/pack-REGION`: the pack with that expert and its prompts.

    Args:
        study: YAML file; its data, experts' ranks, schedule of the student and patches are used, its preprocessing is the pack's.
        out: folder of the new pack, the report, the cache and the checkpoint.
        region: of the new expert; a training case must have labels of it.
        pack: folder that is added to; default `OUT/pack`. It is not changed.
        steps: in place of the study's.
        narrate: name of a network -> progress.
        say: hears of cases that are skipped.
        flags: settings that override the file.

    Raises:
        InputError: a pack that cannot get that expert.
        DataError: no training case of the region.
        StepError: the training diverged.
    """
    out, source = Path(out), str(Path(out) / "pack" if pack is None else pack)
    bundle = load_segmenter(source if source.startswith(PREFIX) else Path(source))
    _check_pack(bundle, region)
    settings = _as_packed(read_study(study, steps=steps, **flags), bundle)
    context = open_context(settings, folder=Path(study).resolve().parent, out=out, narrate=narrate, say=say)
    check_experts_have_cases(context.cohort, [region])
    cohort = cohort_of(context.cohort, region, bundle)
    name = region.replace(" ", "-")
    if not context.writes:
        _trained(context, bundle, cohort, region)
        return SegmentationResult({}, [])
    with Run("decompose-add-expert", out / f"pack-{name}-run", settings=settings, seed=settings.seed, device=settings.device) as run:
        run.add_input(study)
        run.add_input(bundle.source / packs.MANIFEST)
        network = _trained(context, bundle, cohort, region)
        table = measured(context, f"expert {region}", network, cohort)
        written = _write(out / f"pack-{name}", bundle, network, cohort, settings, region)
        run.add_output("pack", written)
        run.results.update(table=table, networks=context.facts, skipped=list(cohort.faults), cases=context.case_counts())
    return SegmentationResult({"pack": written}, table)


def _check_pack(bundle: SegmenterBundle, region: str) -> None:
    where = f"{bundle.source}: --add-expert"
    if bundle.weights.experts and region in bundle.weights.experts:
        raise InputError(where, f"{region!r}, which has an expert", "a region without one", "use another region, or finetune the pack")
    if region not in REGIONS:
        raise InputError(where, repr(region), f"one of {', '.join(REGIONS)}", "use the vocabulary's spelling")
    if bundle.region is not None or not bundle.weights.experts:
        raise InputError(where, "a network without experts", "a pack with a shared base and experts", "give the pack of a decomposition")
    if bundle.prompts is None or not bundle.source.is_dir():
        raise InputError(where, "no table of prompts", "a pack with its prompts inside", "export one with --text or --prompt-embeddings")


def _as_packed(settings: SegmentationSettings, bundle: SegmenterBundle) -> SegmentationSettings:
    """The study with the pack's preprocessing: the base knows no other."""
    if any(side % bundle.config.patch for side in settings.patch_size):
        came = f"patch_size {settings.patch_size}"
        raise InputError("patch_size", came, f"multiples of the pack's patch, {bundle.config.patch}", "change it in the study")
    own = {name: value for name, value in bundle.preprocessing.items() if name in KNOWN_PREPROCESSING}
    return settings.changed(preprocessing=own)


def cohort_of(cohort: Cohort, region: str, bundle: SegmenterBundle) -> Cohort:
    """Cases and labels of the region; their prompts have the pack's rows, new ones come after them.

    Raises:
        InputError: a label that another expert of the pack answers.
    """
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # checked by the caller
    part = cohort.only(region)
    prompts = {pair: p for pair, p in cohort.prompts.items() if p.region == region}
    answered = regions_of_prompts(bundle)
    taken = sorted({p.key for p in prompts.values() if answered.get(p.key, region) != region and answered[p.key] in bundle.weights.experts})
    if taken:
        faults = [f"{key}: answered by the expert for {answered[key]}" for key in taken]
        raise InputError("labels", f"{len(taken)} that the pack knows", "labels of no other expert", "leave them out", faults=faults)
    keys = (*bundle.prompts.keys, *sorted({p.key for p in prompts.values()} - set(bundle.prompts.keys)))
    rows = {key: row for row, key in enumerate(keys)}
    return replace(part, prompts={pair: replace(p, row=rows[p.key]) for pair, p in prompts.items()})


def regions_of_prompts(bundle: SegmenterBundle) -> dict[str, str]:
    """`modality/label` -> region of the prompts in a pack's table, as far as vocabulary and pack record them."""
    known: dict[str, str] = {entry.key: entry.region for entry in default_vocabulary().entries()}
    known |= bundle.preprocessing.get("label_regions", {})
    return {key: known[key] for key in (bundle.prompts.keys if bundle.prompts else ()) if key in known}


def _trained(context: StudyContext, bundle: SegmenterBundle, cohort: Cohort, region: str) -> PromptedSegmenter:
    settings = context.settings
    seed_everything(settings.seed)
    network = network_with_new_expert(bundle, cohort, settings, region)
    job = NetworkJob(f"expert {region}", settings.student, cohort, ("student", "experts"), begins_with=hash_of(network))
    network = context.finish(job, network)
    if settings.weights == "fp16":
        _round_expert(network, region, known=len(bundle.prompts.keys) if bundle.prompts else 0)
    return network


def network_with_new_expert(bundle: SegmenterBundle, cohort: Cohort, settings: SegmentationSettings, region: str) -> PromptedSegmenter:
    """The pack's network with an untrained expert and untrained prompts, all else frozen."""
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # checked by the caller
    weights, known = bundle.weights, len(bundle.prompts.keys)
    labels = {region: len({p.key for p in cohort.prompts.values()})}
    targets = {target for expert in weights.experts.values() for target in expert.pairs}
    ranks = choose_expert_ranks(settings.experts, weights.config, labels, bundle.network(None))
    layout = next(iter(weights.experts.values())).layout
    pairs = {}
    for (target, _), rank in ranks.items():
        if target in targets:
            shape_A, shape_B = factor_shapes(weights.base[f"{target}.weight"].shape, rank, layout)
            lora_A = torch.empty(shape_A)
            torch.nn.init.kaiming_uniform_(lora_A, a=5**0.5)
            pairs[target] = (lora_A, torch.zeros(shape_B))
    new = Expert(pairs, dict.fromkeys(pairs, settings.experts.scaling), layout)
    model = segmenter_with_experts(SegmenterWeights(weights.config, weights.base, {**weights.experts, region: new}), dropout=0.0)
    set_trainable(model, base=False, experts=[region])
    added = len({p.row for p in cohort.prompts.values() if p.row >= known})
    rows = torch.cat([bundle.prompts.embeddings.float(), new_prompts(added, weights.config.query_width, seed=settings.seed)])
    return PromptedSegmenter(model, rows, learn_prompts=added > 0, known_rows=known)


@torch.no_grad()
def _round_expert(network: PromptedSegmenter, region: str, *, known: int) -> None:
    """Round what was trained to 16 bits, and nothing else."""
    layers = [m for m in network.modules() if isinstance(m, ExpertLayer) and m.ranks.get(region)]
    trained = [t for layer in layers for t in (layer.lora_A[region], layer.lora_B[region])]
    for tensor in (*trained, network.prompts[known:]):
        tensor.copy_(tensor.half().float())


def _write(
    path: Path, bundle: SegmenterBundle, network: PromptedSegmenter, cohort: Cohort, settings: SegmentationSettings, region: str
) -> Path:
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # checked by the caller
    weights = collect_weights(network.segmenter)
    old = bundle.weights.experts
    experts = {name: old.get(name, expert) for name, expert in weights.experts.items()}
    weights = without_loss(SegmenterWeights(weights.config, bundle.weights.base, experts, weights.form))
    new_keys = sorted({p.key: p.row for p in cohort.prompts.values() if p.row >= len(bundle.prompts.keys)}.items(), key=lambda kv: kv[1])
    table = PromptTable((*bundle.prompts.keys, *(key for key, _ in new_keys)), smallest_type(network.prompts.detach().cpu()))
    trained = {p.key for p in cohort.prompts.values()}  # where the study says a label's own region again, no older word stays
    own = {key: place for key, place in bundle.preprocessing.get("label_regions", {}).items() if key not in trained}
    preprocessing = {**bundle.preprocessing, "label_regions": {**own, **cohort.label_regions()}}
    about = dict(packs.read_manifest(bundle.source, kind=KIND).get("about", {}))
    data = [{"name": e.name, "licence": e.licence, **({"note": e.note} if e.note else {})} for e in settings.data]
    added = {"region": region, "study": settings.name, "data": data, "settings": settings.model_dump(mode="json")}
    about["added"] = [*about.get("added", []), added]
    return write_segmenter_pack(path, weights, prompts=table, preprocessing=preprocessing, about=about)
