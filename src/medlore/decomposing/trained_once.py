"""A network of a study is trained once: what decides its weights makes an identity, and the next run with it takes them over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medlore.errors import CheckpointError
from medlore.files import atomic_path, read_json, write_json
from medlore.training.checkpoint import Checkpoint, read_saved

_HISTORY = "history.json"


def identity_of(*decisive: Any) -> str:
    """A hash of all that decides a network's weights: plain values, in any order of their keys."""
    return hashlib.sha256(json.dumps(list(decisive), sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class TrainedOnce:
    """The folder `networks` of a study: for each network its weights, its history, and a checkpoint while it is trained.

    Attributes:
        folder: of all networks.
        accelerator: of the run; one process writes.
        weights: name of the file of weights.
        minutes: between two checkpoints; None: one after every judgement.
    """

    folder: Path
    accelerator: Any
    weights: str = "weights.pt"
    minutes: float | None = None

    def state_of(self, name: str, identity: str) -> str:
        """`trained`, `begun` or `to be trained`: what the next run finds."""
        if self._place(name, identity) is not None:
            return "trained"
        return "begun" if self._checkpoint(name, identity).exists() else "to be trained"

    def finish(self, name: str, identity: str, network: nn.Module, train: Callable[[Checkpoint], dict[str, Any]]) -> dict[str, Any]:
        """Train a network, go on with it, or take over a finished one of the same identity.

        Args:
            name: of the network, and of its folder.
            identity: see `identity_of`.
            network: gets the weights, on the device of the run.
            train: trains it, and answers with its history.

        Returns:
            The history of the training that made the weights.

        Raises:
            StepError: the training diverged.
            CheckpointError: a finished network or a checkpoint that is damaged or does not fit.
        """
        if (place := self._place(name, identity)) is not None:
            self._take_over(place, network)
            return {key: value for key, value in self._record(place).items() if key != "identity"}
        checkpoint = self._checkpoint(name, identity)
        history = train(checkpoint)
        if self.accelerator.is_main_process:
            self._keep_finished(name)
            with atomic_path(self._weights(name)) as temporary:
                torch.save(network.state_dict(), temporary)
            write_json(self.folder / name / _HISTORY, {"identity": identity, **history})
            checkpoint.path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return history

    def _place(self, name: str, identity: str) -> str | None:
        """Where a finished network of this identity lies: under its name, or put aside for one of other settings."""
        places = (name, f"{name}-{identity[:8]}")
        return next((place for place in places if self._record(place).get("identity") == identity), None)

    def _keep_finished(self, name: str) -> None:
        """Put a finished network of other settings aside, whole at every moment, so that going back to them does not train it again."""
        held = self._record(name)
        if held.get("identity"):
            aside = f"{name}-{held['identity'][:8]}"
            write_json(self.folder / aside / _HISTORY, held)
            self._weights(name).replace(self._weights(aside))

    def _take_over(self, name: str, network: nn.Module) -> None:
        path = self._weights(name)
        fix = f"delete {path.parent} and run again: the network is then trained again"
        saved = read_saved(path, "the weights of a finished network", fix)
        try:
            network.load_state_dict(saved)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(str(path), "of another network", "the weights of a finished network", fix) from error
        network.to(self.accelerator.device)

    def _record(self, name: str) -> dict[str, Any]:
        path = self.folder / name / _HISTORY
        return dict(read_json(path)) if path.is_file() and self._weights(name).is_file() else {}

    def _weights(self, name: str) -> Path:
        return self.folder / name / self.weights

    def _checkpoint(self, name: str, identity: str) -> Checkpoint:
        path = self.folder / name / f"checkpoint-{identity[:12]}.pt"
        return Checkpoint(path, identity, self.minutes, restart=f"delete {path.name} there to begin this network again")
