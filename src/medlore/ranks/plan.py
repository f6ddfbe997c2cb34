"""RankPlan: which matrices are adapted, with what rank and alpha, why, and for which weights. Data only; a file one can edit."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import pydantic
from torch import nn

from medlore.assets import PREFIX
from medlore.errors import DataError, MedloreError, TargetError
from medlore.files import read_json, write_json
from medlore.ranks.export import lora_config
from medlore.ranks.measure import Granularity
from medlore.ranks.places import STRICT, Found, Layout, Seen, Target, Tower
from medlore.ranks.planned import PlannedLayer, digest, matrix_of, row_indices
from medlore.ranks.rules import AlphaRule, alpha_rule
from medlore.ranks.sources import ModuleSource, WeightSource
from medlore.ranks.summary import coverage_lines, short_table, totals_line
from medlore.ranks.targets import find_targets

if TYPE_CHECKING:
    from peft import LoraConfig

_FAMILY = "medlore/rank-plan/"
PLAN_SCHEMA = f"{_FAMILY}2"
_READ = (f"{_FAMILY}1", PLAN_SCHEMA)  # 1 had no coverage, towers, interleaved rows and stacked experts


@dataclass(frozen=True, repr=False)
class RankPlan:
    """Ranks and alphas for the layers of one model, with everything that led to them.

    `coverage` lists which attention modules were seen, which of them were taken, and why the others were not.

    `sha256` is taken over the planned matrices in depth order, each as little-endian float32, whatever the container, the
    naming and the storage (fused or separate) were. It is therefore the same for one set of weights in all of them.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    source: str
    layout: Layout
    targets: str
    granularity: Granularity
    rule: str
    layers: tuple[PlannedLayer, ...]
    sha256: str | None = None
    include_k: bool = False
    rounding: str = "half-even"
    scale: float = 1.0
    budget: str | None = None
    alpha_rule: str = "rank*1"
    min_rank: int = 1
    max_rank: int | None = None
    proof: bool = False
    seed: int = 0
    model_parameters: int = 0
    blocks: int = 0
    tower: Tower = "auto"
    coverage: tuple[Seen, ...] = ()

    def __repr__(self) -> str:
        notes = coverage_lines(self.coverage)
        head, totals = f"RankPlan of {self.source} ({self.rule}, {self.targets})", totals_line(self.layers, self.model_parameters)
        return "\n".join([head, short_table(self.layers), totals, *notes])

    @property
    def parameters(self) -> int:
        """Parameters of all factor pairs."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def uniform_rank(self) -> float:
        """The one rank that would have as many parameters on the same targets; rarely a whole number."""
        return self.parameters / sum(sum(layer.shape) for layer in self.layers)

    @property
    def use_rslora(self) -> bool:
        """Whether scalings are alpha / √rank."""
        return self._alpha.kind == "rslora"

    @property
    def _alpha(self) -> AlphaRule:
        return alpha_rule(self.alpha_rule)

    def scaling(self, layer: PlannedLayer) -> float:
        """What the product of the factors of `layer` is multiplied with."""
        return self._alpha.scaling(layer.alpha, layer.rank)

    def with_ranks(self, ranks: Sequence[int], *, rule: str, decided_by: str) -> RankPlan:
        """The same targets with other ranks; alphas follow the plan's own rule."""
        layers = tuple(
            replace(layer, rank=rank, alpha=self._alpha.alpha(rank), decided_by=decided_by)
            for layer, rank in zip(self.layers, ranks, strict=True)
        )
        return replace(self, layers=layers, rule=rule, budget=None)

    def nested_ranks(self) -> list[list[int]]:
        """`[rank of q, rank of the output projection]` for each block: the published form, for fused granularity."""
        blocks: dict[str, dict[str, int]] = {}
        for layer in self.layers:
            if layer.part in "qkvo":
                blocks.setdefault(layer.group, {})[layer.part] = layer.rank
        return [[b[p] for p in ("q", "o") if p in b] for b in blocks.values()]

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return write_json(path, {"schema": PLAN_SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read a plan.

        Raises:
            InputError: no such file.
            DataError: not a plan, or wrong values in it; all of them are listed.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.get("schema") not in _READ:
            came = f"schema {content.get('schema')!r}" if isinstance(content, dict) else f"a {type(content).__name__}"
            raise DataError(
                str(path), came, f"a plan of schema {' or '.join(_READ)}", "write one with `medlore ranks SOURCE --out plan.json`"
            )
        values = {k: v for k, v in content.items() if k != "schema"}
        try:
            plan = pydantic.TypeAdapter(RankPlan).validate_python(values)
            faults = list(_faults_of(plan))
        except pydantic.ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e.get('input')!r:.60}" for e in error.errors()]
        if faults:
            raise DataError(str(path), f"{len(faults)} faults", "the plan as it was written", "correct what is listed", faults=faults)
        return plan

    def for_model(self, model: nn.Module, *, check: bool = True) -> RankPlan:
        """The same plan with the names of `model`.

        Names are kept where the model has them. Otherwise layers are matched by structure (n-th q to n-th q, and so on), so a
        plan made from a timm file serves a transformers model that holds the same weights.

        Args:
            model: the model that is to be tuned.
            check: refuse a model whose planned weights are not those that the plan was computed for.

        Raises:
            TargetError: layers are missing or have other shapes, or, with `check`, hold other weights; all are listed.
        """
        return self.for_source(ModuleSource(model), check=check)

    def for_source(self, source: WeightSource, *, check: bool = True) -> RankPlan:
        """As `for_model`, for any opened weights."""
        plan = self if all(_fits(layer, source) for layer in self.layers) else self._renamed(source)
        if check:
            plan._check_weights(source)
        return plan

    def to_lora_config(self, *, model: nn.Module | None = None, check: bool = True, folded: bool = False, **options: Any) -> LoraConfig:
        """A PEFT `LoraConfig` with the ranks and alphas of the plan under exact names.

        Args:
            model: take the names of this model (see `for_model`); without it the plan's own are used.
            check: refuse a model with other weights.
            folded: scalings live inside the factors of fused modules, as `medlore.get_peft_model` writes them.
            options: further fields of `LoraConfig` (dropout, `modules_to_save`, ...).

        On a fused qkv matrix PEFT trains one factor pair over q, k and v; `medlore.get_peft_model` trains q and v apart.

        Raises:
            TargetError: the plan does not fit `model`, or comes from a JAX file and no model is given.
            InputError: an option that the plan decides.
        """
        plan = self if model is None else self.for_model(model, check=check)
        return lora_config(
            plan.layers, self._alpha, source=f"plan of {self.source}", is_jax=plan.layout == "jax", folded=folded, options=options
        )

    def _renamed(self, source: WeightSource) -> RankPlan:
        if self.targets not in ("attention", "attention+mlp"):
            return self._suffix_renamed(source)
        try:
            found = found_in(source, self.targets, include_k=self.include_k, tower=self.tower)
        except TargetError as error:
            raise error.at(f"plan of {self.source} for {source.label}") from None
        if len(found.attentions) != self.blocks:
            raise self._misfit(source, [f"{self.blocks} attention blocks in the plan, {len(found.attentions)} in the model"])
        there = {place: t for t, place in _places(found.targets)}
        faults, renamed = [], []
        for layer, place in _places(self.layers):
            target = there.get(place)
            if target is None:
                faults.append(f"{layer.label}: block {layer.block} of the model has no such {layer.part}")
            elif target.shape != layer.shape:
                faults.append(f"{layer.label}: {layer.shape} in the plan, {target.shape} in {target.name}")
            else:
                renamed.append(_placed(layer, target))
        if faults:
            raise self._misfit(source, faults)
        return replace(self, layers=tuple(renamed), layout=found.layout)

    def _suffix_renamed(self, source: WeightSource) -> RankPlan:
        """Layers of a free choice are found by the end of their names, if that is unique."""
        faults, renamed = [], []
        for layer in self.layers:
            ends = f".{layer.name}.{layer.tensor}"
            hits = [k for k in source.shapes if k.endswith(ends) or ends.endswith("." + k)]
            candidate = replace(layer, name=hits[0].removesuffix(f".{layer.tensor}")) if len(hits) == 1 else layer
            if _fits(candidate, source):
                renamed.append(candidate)
            else:
                faults.append(f"{layer.label}: " + ("no such module" if not hits else f"other shape or several: {', '.join(hits[:3])}"))
        if faults:
            raise self._misfit(source, faults)
        return replace(self, layers=tuple(renamed))

    def _check_weights(self, source: WeightSource) -> None:
        faults = []
        for layer in self.layers:
            here = None if layer.sha256 is None else digest(matrix_of(layer, source.read(layer.key)))
            if here is not None and here != layer.sha256:
                faults.append(f"{layer.label} holds other values")
        if faults:
            raise TargetError(
                f"plan of {self.source}",
                f"{len(faults)} of {len(self.layers)} layers of {source.label} hold other weights",
                "the weights that the plan was computed for",
                "compute a plan for this checkpoint, or pass check=False (--any-weights) to use it all the same",
                faults=faults,
            )

    def _misfit(self, source: WeightSource, faults: list[str]) -> TargetError:
        return TargetError(
            f"plan of {self.source}",
            f"{len(faults)} layers do not fit {source.label}",
            "a model with the same layers",
            "compute a plan for this model with medlore.plan_ranks(model)",
            faults=faults,
        )


def found_in(source: WeightSource, targets: str, *, include_k: bool, tower: Tower) -> Found:
    """The targets of an opened source; rows of fused matrices are tried out where there is something to try."""
    return find_targets(
        source.shapes, targets, include_k=include_k, kinds=source.kinds, tower=tower, orders=source.orders(), tied=source.tied
    )


def place_of(plan: RankPlan) -> str | None:
    """The file, folder, shipped or hub name that a plan was made from; None for a module in memory, which has only a class."""
    is_place = Path(plan.source).exists() or plan.source.startswith(PREFIX) or "/" in plan.source
    return plan.source if is_place else None


def is_plan_file(path: str | Path) -> bool:
    """Whether a file says that it is a plan, right or wrong."""
    try:
        content = read_json(path)
    except (MedloreError, OSError):
        return False
    return isinstance(content, dict) and str(content.get("schema", "")).startswith(_FAMILY)


def plan_digest(digests: Iterable[str | None]) -> str | None:
    """SHA-256 over the digests of all matrices in depth order; None if one is missing."""
    known = list(digests)
    if any(d is None for d in known):
        return None
    return hashlib.sha256("".join(cast("list[str]", known)).encode()).hexdigest()


def _fits(layer: PlannedLayer, source: WeightSource) -> bool:
    shape = source.shapes.get(layer.key)
    if shape is None:
        return False
    if layer.experts > 1:
        return shape == (layer.experts, *layer.shape)
    height, width = shape[0], math.prod(shape[1:])
    if layer.period is not None:
        fitting = height % layer.period == 0 and layer.rows is not None and layer.rows[1] <= layer.period
        return layer.shape[1] == width and fitting and layer.shape[0] == len(row_indices(layer, height))
    return layer.shape[1] == width and (layer.shape[0] == height if layer.rows is None else layer.rows[1] <= height)


def _placed(layer: PlannedLayer, target: Target) -> PlannedLayer:
    tensor: Any = target.tensor
    return replace(layer, name=target.name, rows=target.rows, period=target.period, tensor=tensor, group=target.group)


_Place = TypeVar("_Place", bound=PlannedLayer | Target)


def _places(items: Iterable[_Place]) -> Iterable[tuple[_Place, tuple[int, str, int]]]:
    """Each item with its block, its part and its number among equal parts of that block."""
    seen: Counter[tuple[int, str]] = Counter()
    for item in items:
        place = (item.block, item.part)
        yield item, (*place, seen[place])
        seen[place] += 1


def _rows_fit_the_shape(layer: PlannedLayer) -> bool:
    if layer.rows is None:
        return layer.period is None
    count = layer.rows[1] - layer.rows[0]
    if layer.period is None:
        return count == layer.shape[0]
    return 0 <= layer.rows[0] < layer.rows[1] <= layer.period and layer.shape[0] % count == 0


def _faults_of(plan: RankPlan) -> Iterable[str]:
    checks: list[tuple[Callable[[PlannedLayer], bool], str]] = [
        (lambda x: min(x.shape) >= 1, "shape: both sides must be at least 1"),
        (lambda x: 1 <= x.rank <= max(1, min(x.shape)), "rank: from 1 to the smaller side of the matrix; take the layer out for none"),
        (lambda x: math.isfinite(x.alpha) and x.alpha > 0, "alpha: a positive number"),
        (_rows_fit_the_shape, "rows: as many as the shape has"),
        (lambda x: x.experts == 1 or (x.experts > 1 and x.rows is None and not x.tensor), "experts: a whole parameter, from 1"),
    ]
    if not plan.layers:
        yield "layers: none"
    for index, layer in enumerate(plan.layers):
        for holds, text in checks:
            if not holds(layer):
                yield f"layers.{index} ({layer.label}) {text}"
    for label, count in Counter(x.label for x in plan.layers).items():
        if count > 1:
            yield f"layers: {label} stands {count} times"
    try:
        alpha_rule(plan.alpha_rule)
    except Exception as error:
        yield f"alpha_rule: {error}"
