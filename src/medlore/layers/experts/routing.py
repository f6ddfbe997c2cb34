"""Which sample goes to which expert: said once for a forward pass of a whole network.

    with route(model, ["liver", "liver", "brain"]):
        logits = model(images)          # b = 3

The route lives in a context variable: each thread and each async task has its own, nothing is passed through signatures, and
nothing is left behind after the block. Without a route a network computes its shared base alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from medlore.errors import InputError, StepError, TargetError, UnknownNameError

BASE_ALONE = -1
Roster = tuple[str, ...]


@runtime_checkable
class Routed(Protocol):
    """A layer that asks for the route: it knows the names of its experts."""

    experts: Roster


@dataclass(frozen=True)
class Group:
    """The samples of one expert within a batch.

    Attributes:
        expert: index in the roster, or -1 for the shared base alone.
        positions: places in the batch, ascending.
    """

    expert: int
    positions: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the samples lie side by side, so that a slice is enough."""
        return self.positions[-1] - self.positions[0] + 1 == len(self.positions)


@dataclass(frozen=True, eq=False)
class Route:
    """The way of one batch through the experts.

    Attributes:
        roster: names of all experts of the network, in its order.
        groups: the experts present and their samples; empty for a mixture.
        samples: batch size; None when the whole batch, whatever its size, takes the one group.
        mixture: (b, e) weights, or None.
    """

    roster: Roster
    groups: tuple[Group, ...]
    samples: int | None
    mixture: Tensor | None = None
    _kept: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def positions(self, group: Group, device: torch.device) -> Tensor:
        """(n,) indices of a group's samples on a device; copied there once a route."""
        return self._table(("positions", group.expert, device), group.positions, device)

    def inverse(self, device: torch.device) -> Tensor | None:
        """(b,) where each sample lies when the groups follow one another; None when the batch is in that order already."""
        order = [position for group in self.groups for position in group.positions]
        if order == sorted(order):
            return None
        places = {position: place for place, position in enumerate(order)}
        return self._table(("inverse", device), [places[position] for position in range(len(order))], device)

    def slots(self, device: torch.device) -> Tensor:
        """(b,) for each sample the number of its group in `groups`."""
        if ("slots", device) in self._kept:
            return self._kept["slots", device]
        number = {p: n for n, group in enumerate(self.groups) for p in group.positions}
        return self._table(("slots", device), [number[p] for p in range(len(number))], device)

    def _table(self, key: object, values: Sequence[int], device: torch.device) -> Tensor:
        if key not in self._kept:
            self._kept[key] = torch.tensor(values, dtype=torch.long).to(device)
        return self._kept[key]

    def checked(self, batch: int, where: str) -> Route:
        """This route, if it fits a batch of that size.

        Raises:
            InputError: the route was given for another batch size.
        """
        if self.samples is not None and self.samples != batch:
            raise InputError(
                where,
                f"a batch of {batch} samples under a route of {self.samples}",
                "one expert for each sample of the batch that reaches the layer, on its first axis",
                "give the route the length of the batch, or one expert name for all samples",
            )
        return self


_active: ContextVar[tuple[Route, ...]] = ContextVar("medlore_routes", default=())
_recomputing: ContextVar[bool] = ContextVar("medlore_recomputing", default=False)


def active_route(roster: Roster) -> Route | None:
    """The innermost route of this thread for networks with these experts, or None."""
    for found in reversed(_active.get()):
        if found.roster == roster:
            return found
    return None


@contextmanager
def route(model: nn.Module, experts: str | Sequence[str | None] | Tensor) -> Iterator[Route]:
    """Send the samples of every forward pass inside the block through experts.

    The route holds for all networks with the same expert names that run in this thread inside the block; blocks nest, the inner one wins.

    Args:
        model: a network with expert layers; a wrapper such as DistributedDataParallel may be around it.
        experts: one name for all samples; or a name for each sample (None: the shared base alone); or a whole-number tensor (b,) of
            indices in the network's order (-1: the shared base alone); or a floating tensor (b, e) of mixture weights.

    Yields:
        The checked route.

    Raises:
        TargetError: the model has no expert layers.
        UnknownNameError: an expert has no such name.
        InputError: indices or weights of a wrong shape or range.

    Example:
        >>> import torch
        >>> from medlore.layers.experts.layer import ExpertLinear
        >>> layer = ExpertLinear(torch.nn.Linear(4, 2), ranks={"liver": 2, "brain": 1})
        >>> with route(layer, ["brain", "liver", None]):
        ...     tuple(layer(torch.zeros(3, 4)).shape)
        (3, 2)

    Source: LoRKD (CVPR 2024), section on efficient knowledge separation, for the task of each sample; ours for the rest.
    """
    made = make_route(roster_of(model), experts)
    token = _active.set((*_active.get(), made))
    try:
        yield made
    finally:
        _active.reset(token)


def roster_of(model: nn.Module) -> Roster:
    """The names of a network's experts, in the order of their indices.

    Raises:
        TargetError: the model has no expert layers.
    """
    for module in model.modules():
        if isinstance(module, Routed):
            return module.experts
    raise TargetError(
        "route", f"a {type(model).__name__} without expert layers", "a network with experts", "call install_experts(model, ...) first"
    )


def make_route(roster: Roster, experts: str | Sequence[str | None] | Tensor) -> Route:
    """A route from names, indices or mixture weights; see :func:`route`."""
    if isinstance(experts, str):
        return Route(roster, (Group(_index(roster, experts), ()),), None)
    if isinstance(experts, Tensor):
        if experts.is_floating_point():
            return _mixture_route(roster, experts)
        return _index_route(roster, _checked_indices(roster, experts))
    return _index_route(roster, [BASE_ALONE if name is None else _index(roster, name) for name in experts])


def _index(roster: Roster, name: str) -> int:
    try:
        return roster.index(name)
    except ValueError:
        raise UnknownNameError("route, experts", str(name), roster) from None


def _checked_indices(roster: Roster, indices: Tensor) -> list[int]:
    if indices.ndim != 1 or indices.dtype == torch.bool:
        raise InputError(
            "route, experts",
            f"a {indices.dtype} tensor of shape {tuple(indices.shape)}",
            "whole numbers (b,), or floating mixture weights (b, e)",
            "give one index for each sample",
        )
    found = [int(i) for i in indices.tolist()]  # the one copy from the device
    wrong = sorted({i for i in found if not BASE_ALONE <= i < len(roster)})
    if wrong:
        raise InputError(
            "route, experts",
            f"indices {wrong}",
            f"-1 (shared base) to {len(roster) - 1} ({roster[-1]!r})",
            "see roster_of(model) for the order",
        )
    return found


def _index_route(roster: Roster, indices: Sequence[int]) -> Route:
    if not indices:
        raise InputError("route, experts", "an empty list", "one expert for each sample", "give names or indices")
    places: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        places.setdefault(index, []).append(position)
    # in the order of appearance: a batch that is sorted by expert, however, needs no gathering
    return Route(roster, tuple(Group(index, tuple(found)) for index, found in places.items()), len(indices))


def _mixture_route(roster: Roster, weights: Tensor) -> Route:
    if weights.ndim != 2 or weights.shape[1] != len(roster):
        raise InputError(
            "route, experts",
            f"mixture weights of shape {tuple(weights.shape)}",
            f"(b, {len(roster)}): one weight for each sample and expert",
            "see roster_of(model) for the columns",
        )
    return Route(roster, (), weights.shape[0], weights)


class RouteMemory:
    """What a layer remembers for activation checkpointing.

    A checkpointed block runs again during the backward pass, when its `with route(...)` block is often over, and on a GPU in another
    thread. The layer then takes the route of its last forward pass. If it ran under two different routes with the same weights, and no
    backward pass between, the right one cannot be known from here, and it says so rather than compute a wrong gradient.
    """

    def __init__(self) -> None:
        self._last: Route | None = None
        self._version = -1
        self._several = False
        self._consumed = True

    def __deepcopy__(self, memo: object) -> RouteMemory:
        """A copied or pickled layer has run under no route yet."""
        return RouteMemory()

    def __reduce__(self) -> tuple[type[RouteMemory], tuple[()]]:
        return RouteMemory, ()

    def current(self, roster: Roster, *, version: int, remember: bool, where: str) -> Route | None:
        """The route for this call of the layer.

        Args:
            roster: names of the layer's experts.
            version: a number that changes with the layer's weights: passes before an optimiser step no longer count.
            remember: whether a backward pass can follow.
            where: name of the layer, for the message.

        Raises:
            StepError: a checkpointed block runs again and the layer saw several routes.
        """
        found = active_route(roster)
        if torch._C._current_graph_task_id() != -1 and not _recomputing.get():  # inside a backward pass
            return self._recalled(found, where)
        if remember:
            fresh = self._consumed or version != self._version
            self._several = not fresh and (self._several or found is not self._last)
            self._last, self._version, self._consumed = found, version, False
        return found

    def _recalled(self, found: Route | None, where: str) -> Route | None:
        if self._several:
            raise StepError(
                where,
                "a checkpointed block runs again after several forward passes under different routes",
                "one route between two backward passes",
                "call backward() after each forward pass, or give checkpoint(..., context_fn=route_contexts)",
            )
        never_ran = self._consumed and self._last is None
        self._consumed = True
        return found if never_ran else self._last


def route_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of :func:`torch.utils.checkpoint.checkpoint` that carries the present routes into the second run of a block.

    Needed only where several forward passes with different routes come before one backward pass.

    Source: ours.
    """
    kept = _active.get()

    @contextmanager
    def again() -> Iterator[None]:
        routes, flag = _active.set(kept), _recomputing.set(True)
        try:
            yield
        finally:
            _recomputing.reset(flag)
            _active.reset(routes)

    return nullcontext(), again()
