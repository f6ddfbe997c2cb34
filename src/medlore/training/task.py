"""What a training gives to the engine: batches by step, named terms of a loss, a judgement, and what must survive a kill.

A new kind of training is one class derived from `Task`; nothing else of the engine has to be touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medlore.errors import StepError


@dataclass(frozen=True)
class Stretch:
    """The steps since the last line of the history.

    Attributes:
        step: how many steps of the whole training are done.
        terms: mean of each term of the loss.
        loss: mean of their sum.
        rate: learning rate of the last step.
    """

    step: int
    terms: Mapping[str, float]
    loss: float
    rate: float


@dataclass(frozen=True)
class Judgement:
    """What a task says of the weights as they are.

    Attributes:
        record: for the history and the watchers; None for nothing. Plain numbers, texts and containers: it goes into checkpoints.
        key: higher is better, compared entry by entry; an equal key keeps the earlier weights. None: not defined; the latest weights
            are kept as long as no key has been.
    """

    record: dict[str, Any] | None = None
    key: tuple[float, ...] | None = None


class Task(ABC):
    """One training of one network.

    Args:
        name: for messages and trackers.
        module: what computes; every parameter that is trained is one of its own, unless `parameters` says otherwise.
        accelerator: device, precision and processes.
        seed: of everything that is drawn from torch's own generator.
    """

    keeps_best: ClassVar[bool] = False  # whether the weights of the best judgement are kept, or those of the end

    def __init__(self, name: str, module: nn.Module, accelerator: Any, *, seed: int = 0) -> None:
        self.name, self.module, self.accelerator, self.seed = name, module, accelerator, seed
        self.forward: nn.Module = module  # prepared for device, precision and processes once the training begins

    # ---- What every task must say -----------------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, start: int, stop: int) -> Generator[Any]:
        """This process's part of the batches of steps `start` to `stop`, on its device: `accumulate` of them for each step.

        A batch is a function of the seed and its number alone, so that a training can go on from any step.
        """

    @abstractmethod
    def loss(self, batch: Any, step: int) -> Mapping[str, Tensor]:
        """The terms of the loss, scalars in 32 bits, each already weighted; their sum is brought down. Runs `self.forward`."""

    @abstractmethod
    def judge(self, stretch: Stretch) -> Judgement:
        """Look at the weights that would be kept: the average where there is one."""

    # ---- What most tasks leave as it is -----------------------------------------------------------------------------------

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser moves, by name."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def spares(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay spares a parameter: vectors (norms, biases) always, and what a task adds."""
        del name
        return parameter.ndim < 2

    def share_of_rate(self, name: str) -> float:
        """Factor on the schedule's rate for a parameter."""
        del name
        return 1.0

    def seed_of(self, step: int) -> int | None:
        """Seed of torch's generator for a step; None draws on from the step before, and no checkpoint is written in front of it."""
        return seed_of(self.seed, step, self.accelerator.process_index)

    def prepare(self) -> None:
        """Move to the device, and wrap for precision and processes."""
        self.forward = self.accelerator.prepare_model(self.module)

    def release(self) -> None:
        """The network as it was given, without what `prepare` put around it."""
        self.accelerator.unwrap_model(self.forward, keep_fp32_wrapper=False)
        self.forward = self.module

    def training_mode(self) -> None:
        """Called before the first step and after every judgement."""
        self.module.train()

    def begin(self, step: int) -> None:  # noqa: B027 - most tasks have nothing to do here
        """Called before the batch of a step is made."""

    def gather_gradients(self) -> None:  # noqa: B027
        """Called when the gradients of a step are there, before they are clipped."""

    def updated(self, step: int) -> None:  # noqa: B027
        """Called after the optimiser's step; gradients are still there."""

    def cases(self, batch: Any) -> Sequence[str]:
        """Names of what a batch holds, for the message when its loss is not finite."""
        del batch
        return ()

    def size(self, batch: Any) -> int:
        """What a batch counts in the means of the history."""
        del batch
        return 1

    def place(self, step: int) -> str:
        """Where a message says that it is."""
        return f"{self.name}, step {step}"

    # ---- What a checkpoint holds ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the training changes."""
        return self.module.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put `state` back."""
        self.module.load_state_dict(state)

    def kept(self) -> dict[str, Tensor]:
        """The tensors that are kept at the best judgement; a part of `state`, of the same names or others."""
        return self.state()

    def load_kept(self, kept: Mapping[str, Tensor]) -> None:
        """Put `kept` back."""
        self.load_state(kept)

    def memory(self) -> dict[str, Any]:
        """What besides tensors must survive a kill: plain values and tensors."""
        return {}

    def load_memory(self, memory: Mapping[str, Any]) -> None:  # noqa: B027
        """Put `memory` back."""


def seed_of(*numbers: int) -> int:
    """A seed for torch out of several numbers from 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


_FEW = 4  # so many cases stand in the place of a message, more of them below it


def not_finite(task: Task, step: int, loss: float, terms: Mapping[str, float], norm: float, cases: Sequence[str], fix: str) -> StepError:
    """The error of a step whose loss or gradient is not a number: the step, its cases, every term, and what to do."""
    names = list(dict.fromkeys(cases))
    place = task.place(step) + (f", cases {', '.join(names)}" if 0 < len(names) <= _FEW else "")
    parts = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    came = f"the loss is {loss:g}" + (f" ({parts})" if len(terms) > 1 else "") + f", the norm of its gradient {norm:g}"
    faults = names if len(names) > _FEW else ()
    return StepError(place, came, "finite numbers", ("check these cases, or " if names else "") + fix, faults=faults)


def all_finite(state: Mapping[str, Tensor]) -> bool:
    """Whether every number of a state is one."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values() if tensor.is_floating_point())
