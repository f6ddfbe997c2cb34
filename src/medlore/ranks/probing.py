"""Rows of a fused matrix identified by probing: the attention module is called, and what each row does is looked at.

On a copy of the module with random weights and without biases, the numbers that the fused matrix gives are changed by hand:

* q: no row of another token answers to it (its gradient reaches one token only);
* v: doubled, it doubles what the output projection reads;
* doubling q and halving k leaves the softmax, and so everything behind it, unchanged.

An order is believed only if all of this holds. A module that cannot be called, or whose rows do something else (a gate, a rotation of
v), has no answer here. The network itself is never changed and its random state is left alone.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medlore.ranks.attention import find_attentions
from medlore.ranks.fused_rows import Answer, Fused, Orders, Split, stacked
from medlore.ranks.model_folders import short_model
from medlore.ranks.model_inputs import ArgumentsFound, module_arguments
from medlore.ranks.places import Rows
from medlore.ranks.roles import split_name

_CLOSE = 1e-3
_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError, AssertionError, ImportError)


class FusedRowProbe:
    """Answers for the fused matrices of one network; equal modules are tried once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[tuple[Any, ...], Answer | None] = {}

    def __call__(self, fused: Fused) -> Answer | None:
        """The order of the rows, or None where nothing can be tried and the names must do."""
        path = _common_path(fused)
        owner = self.model.get_submodule(path)
        if isinstance(owner, nn.MultiheadAttention):
            return Answer(stacked("qkv", fused.shape[0]), "by torch")
        kind = (type(owner), fused.roles, fused.shape, fused.q_rows, fused.out_width, fused.key.removeprefix(fused.path))
        if kind not in self._known:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of networks that are called with next to nothing
                torch.manual_seed(0)
                self._known[kind] = self._tried(owner, path, fused)
        return self._known[kind]

    def _tried(self, owner: nn.Module, path: str, fused: Fused) -> Answer | None:
        if not fused.out_key:
            return None
        tried = False
        for arguments in module_arguments(self.model, owner, path, width=fused.shape[1]):
            trial = _trial(owner, path, fused, arguments)
            if trial is None:
                continue
            tried = True
            split = next((s for s in _candidates(fused, trial) if _holds(s, fused, trial)), None)
            if split is not None:
                return Answer(split, "probed")
        if not tried:
            return None
        return Answer(None, why="the rows of its fused matrix do not act as q, k and v in any order that was tried")


def short_probe(folder: Path) -> Orders | None:
    """Answers for the weights of a transformers folder, by trying a network of the same kind with one block."""
    model = short_model(folder)
    if model is None:
        return None
    probe, known = FusedRowProbe(model), dict[tuple[str, str, tuple[int, int]], Answer | None]()

    def kind(fused: Fused) -> tuple[str, str, tuple[int, int]]:
        return split_name(fused.key.removesuffix(".weight"))[1], fused.roles, fused.shape

    def remember(fused: Fused) -> Answer | None:
        known[kind(fused)] = probe(fused)
        return known[kind(fused)]

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    find_attentions(shapes, {n: s for n, s in shapes.items() if len(s) == 2}, orders=remember, tower="both")
    return lambda fused: known.get(kind(fused))


@dataclass
class _Trial:
    """One module that answers: `run` gives what the output projection reads, with numbers of the fused matrix changed."""

    module: nn.Module
    arguments: ArgumentsFound
    weights: tuple[Tensor, Tensor, Tensor | None]  # fused, output, q apart
    made: Tensor  # what the fused matrix gave: tokens x rows
    read: Tensor  # what the output projection read: tokens x columns

    def run(self, factors: Tensor | None = None, *, q_factor: float = 1.0, leaf: bool = False) -> tuple[Tensor, Tensor]:
        """(numbers of the fused matrix, input of the output projection)."""
        spy = _Spy(self.weights, factors, q_factor, leaf=leaf)
        with spy:
            self.module(*self.arguments.positional, **self.arguments.named)
        if spy.made is None or spy.read is None:
            raise ValueError("the module does not use its matrices")
        return spy.made, spy.read


class _Spy(TorchFunctionMode):
    """Watches every operation that takes one of the weights, whoever calls it."""

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor | None], factors: Tensor | None, q_factor: float, *, leaf: bool) -> None:
        super().__init__()
        fused, output, q = weights
        self.fused, self.output = [fused], [output]  # each with its transposes and other views
        self.q = [] if q is None else [q]
        self.factors, self.q_factor, self.leaf = factors, q_factor, leaf
        self.made: Tensor | None = None
        self.read: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if self.read is None and _among(operands, self.output):
            own = self.output[0].shape
            self.read = next((a for a in operands if not _among([a], self.output) and a.ndim > 1 and a.shape[-1] in own), None)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        for weight in (self.fused, self.output, self.q):
            if _among(operands, weight) and result.ndim > 1:
                return self._seen(weight, result)
        return result

    def _seen(self, weight: list[Any], result: Tensor) -> Tensor:
        if result.untyped_storage().data_ptr() == weight[0].untyped_storage().data_ptr():
            weight.append(result)
        elif weight is self.fused and result.shape[-1] in weight[0].shape:
            self.made = result.detach().requires_grad_() if self.leaf else result
            return self.made * (1.0 if self.factors is None else self.factors)
        elif weight is self.q:
            return result * self.q_factor
        return result


def _among(operands: Iterable[Tensor], weight: Iterable[Tensor]) -> bool:
    return any(a is w for a in operands for w in weight)


def _trial(owner: nn.Module, path: str, fused: Fused, arguments: ArgumentsFound) -> _Trial | None:
    try:
        module = _prepared(owner)
        own = {f"{path}.{name}" if path else name: tensor for name, tensor in module.named_parameters()}
        weights = (own[fused.key], own[fused.out_key], own.get(fused.q_key))
        trial = _Trial(module, arguments.as_float(), weights, torch.empty(0), torch.empty(0))
        with torch.no_grad():
            size = trial.run()[0].std().clamp(min=1e-9)
            for weight in (weights[0], weights[2]):  # weak numbers would make every softmax even, whatever q and k are
                if weight is not None:
                    weight.div_(size)
            trial.made, trial.read = trial.run()
    except _FAILURES:
        return None
    sound = trial.made.shape[-1] == fused.shape[0] and bool(torch.isfinite(trial.read).all()) and bool(trial.read.any())
    return trial if sound and trial.made.shape[:-1].numel() > 1 else None


def _prepared(owner: nn.Module) -> nn.Module:
    """A copy in evaluation mode, float32, on the CPU: random matrices, no biases and no tables of positions."""
    module = copy.deepcopy(owner).float().cpu().eval().requires_grad_(False)
    for name, tensor in module.named_parameters():
        if not tensor.is_floating_point():
            continue
        if "bias" in name or "rel_pos" in name:
            tensor.zero_()
        elif tensor.ndim == 2:
            tensor.copy_(torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5)
    return module


def _common_path(fused: Fused) -> str:
    """The smallest module that holds the fused matrix and the output projection."""
    ours, theirs = fused.path.split("."), fused.out_key.split(".")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return ".".join(ours[:same]) if fused.out_key else fused.path


def _candidates(fused: Fused, trial: _Trial) -> Iterator[Split]:
    """Orders that may be right, the stacked one first."""
    height = fused.shape[0]
    if "q" in fused.roles:
        yield from _around_q(fused, trial)
        return
    for period in _periods(height, len(fused.roles)):
        for order in itertools.permutations(fused.roles):
            size = period // len(order)
            yield {role: Rows(i * size, (i + 1) * size, _none_if(period, height)) for i, role in enumerate(order)}


def _around_q(fused: Fused, trial: _Trial) -> Iterator[Split]:
    """What is q is seen directly; k and v share the rest, in either order and in halves or as wide as q."""
    height = fused.shape[0]
    is_q = _rows_of_one_token(trial)
    if is_q is None or not bool(is_q.any()):
        return
    period = next(p for p in range(1, height + 1) if height % p == 0 and bool((is_q.reshape(-1, p) == is_q[:p]).all()))
    runs = _runs(is_q[:period].tolist())
    mine = [run for run, mark in runs if mark]
    if len(mine) != 1:
        return
    q = Rows(*mine[0], _none_if(period, height))
    rest = [run for run, mark in runs if not mark]
    others = [role for role in "kv" if role in fused.roles]
    for pieces in _divided(rest, len(others), wide=mine[0][1] - mine[0][0]):
        for order in itertools.permutations(others):
            yield {"q": q} | {role: Rows(*piece, q.period) for role, piece in zip(order, pieces, strict=True)}


def _rows_of_one_token(trial: _Trial) -> Tensor | None:
    """Rows whose numbers reach what their own token reads and no other token's: those of q."""
    try:
        with torch.enable_grad():
            made, read = trial.run(leaf=True)
            tokens = read.reshape(-1, read.shape[-1])
            reached = torch.zeros(made.shape[-1], dtype=torch.long)
            busiest = int(tokens.norm(dim=1).argmax())
            for token in {len(tokens) - 1, len(tokens) // 2, busiest}:
                (gradient,) = torch.autograd.grad((tokens[token] * torch.randn(tokens.shape[1])).sum(), made, retain_graph=True)
                size = gradient.reshape(-1, gradient.shape[-1]).abs()
                reached = torch.maximum(reached, (size > 1e-6 * size.amax(0)).sum(0))
    except _FAILURES:
        return None
    return reached == 1


def _divided(rest: list[tuple[int, int]], parts: int, wide: int) -> Iterator[Sequence[tuple[int, int]]]:
    if parts == len(rest):
        yield rest
    elif parts == 2 and len(rest) == 1:
        first, last = rest[0]
        for size in dict.fromkeys(((last - first) // 2, wide, last - first - wide)):
            if 0 < size < last - first:
                yield [(first, first + size), (first + size, last)]


def _runs(marks: list[bool]) -> list[tuple[tuple[int, int], bool]]:
    runs, at = [], 0
    for mark, group in itertools.groupby(marks):
        size = len(list(group))
        runs.append(((at, at + size), mark))
        at += size
    return runs


def _periods(height: int, parts: int) -> Iterable[int]:
    """The whole height, then whatever a head may have."""
    return [p for p in range(height, 2 * parts - 1, -1) if height % p == 0 and p % parts == 0]


def _none_if(period: int, height: int) -> int | None:
    return None if period == height else period


def _holds(split: Split, fused: Fused, trial: _Trial) -> bool:
    """Doubled v doubles the result; doubled q and halved k change nothing."""
    height, q_apart = fused.shape[0], "q" not in split
    try:
        with torch.no_grad():
            if "v" in split and not _near(trial.run(_factors(split, height, v=2.0))[1], 2 * trial.read):
                return False
            if "k" not in split or (q_apart and trial.weights[2] is None):
                return True
            changed = trial.run(_factors(split, height, q=2.0, k=0.5), q_factor=2.0 if q_apart else 1.0)[1]
            return _near(changed, trial.read)
    except _FAILURES:
        return False


def _factors(split: Split, height: int, **by_part: float) -> Tensor:
    factors = torch.ones(height)
    for part, factor in by_part.items():
        if part in split:
            rows = split[part]
            period = rows.period or height
            factors.reshape(-1, period)[:, rows.first : rows.last] = factor
    return factors


def _near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _CLOSE * wanted.norm())
