"""Random masks over the components of LoRA whose odds follow each component's Shapley value; evaluation uses all of them.

A step of a run of T steps keeps component i of a layer with probability p_i, where logit p_i = logit p + z_i, p = t / T grows
evenly from 0 to 1, and z_i is the component's Shapley value so far, standardised within its layer. The kept components are
scaled by r / k. The stable rank says how many components a layer has (the prior); the Shapley values say which are worth
training (the posterior).

The Shapley value of a component is its mean contribution to coalitions that hold each other component with probability p, over
p from 0 to 1 (Owen's formula), and p goes from 0 to 1 here anyway. The contribution itself is taken to first order: the loss
falls by the negative derivative to the component's mask, which the backward pass gives for kept and left-out components alike.

At the end p is 1: training ends at what evaluation, merging and saving use, all components with the ordinary scaling. So the
output is deterministic and the adapter an ordinary LoRA folder.

Source: the plan (stable-rank prior, Shapley posterior, progressive stochastic masks) is announced as SSR-LoRA beside Zhang, Wang
and Gu, ICCV 2025; the estimator and the deterministic evaluation are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from medlore.errors import InputError, TargetError

_ATTRIBUTE = "component_gate"


class Gate:
    """Mask and Shapley values of one factor pair."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.mask = torch.ones(rank, device=device)
        self.sums = torch.zeros(rank, dtype=torch.float64)
        self.steps = 0

    def apply(self, components: Tensor) -> Tensor:
        """(..., r) -> (..., r): left-out components are zero, the others share the scaling."""
        mask = self.mask.to(components.dtype)
        return components * (mask * (self.rank / mask.detach().sum()))

    def values(self) -> Tensor:
        """(r,) mean contribution of each component; every step counts alike, whatever the size of its loss."""
        return self.sums / max(1, self.steps)

    def odds(self, share: float) -> Tensor:
        """(r,) probabilities to be kept when `share` of all are kept on average and nothing is known of any."""
        values = self.values()
        spread = values.std(correction=0)
        standard = (values - values.mean()) / spread if spread > 0 else torch.zeros_like(values)
        return torch.sigmoid(torch.logit(torch.tensor(share, dtype=torch.float64)) + standard)

    def draw(self, share: float, generator: torch.Generator) -> None:
        """Draw the mask of one step; at least one component is kept."""
        chances = torch.rand(self.rank, generator=generator, dtype=torch.float64)
        odds = self.odds(share)
        kept = chances < odds
        if not kept.any():
            kept[torch.argmax(odds - chances)] = True
        self.mask = kept.to(self.mask.device, self.mask.dtype).requires_grad_(True)

    def observe(self) -> None:
        """Take the contributions of the step that has just been differentiated."""
        if self.mask.grad is None:
            return
        slope = self.mask.grad.double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(slope)  # every process must draw the same masks
        total = float(slope.abs().sum())
        if total > 0:
            self.sums += (-slope / total).cpu()
            self.steps += 1
        self.mask = self.mask.detach()


class ComponentMasks:
    """The gates of all factor pairs of one model.

    Call `draw()` before and `observe()` after each step. `state_dict()` holds all that a resumed run needs.

    Attributes:
        gates: name of the layer -> its gate.
        steps: of the whole run.
        step: steps begun so far.
    """

    def __init__(self, steps: int, seed: int) -> None:
        self.gates: dict[str, Gate] = {}
        self.steps, self.step = max(1, steps), 0
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> None:
        """Draw every mask anew."""
        self.step += 1
        share = min(1.0, self.step / self.steps)
        for gate in self.gates.values():
            gate.draw(share, self.generator)

    def observe(self, _step: int = 0) -> None:
        """Take the contributions of this step."""
        for gate in self.gates.values():
            gate.observe()

    def values(self) -> dict[str, list[float]]:
        """Layer -> Shapley value of each component, as shares of a step's total change."""
        return {name: gate.values().tolist() for name, gate in self.gates.items()}

    def state_dict(self) -> dict[str, Any]:
        """Generator, steps and values."""
        return {
            "generator": self.generator.get_state(),
            "step": self.step,
            "gates": {name: {"sums": gate.sums.clone(), "steps": gate.steps} for name, gate in self.gates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken.

        Raises:
            InputError: the state belongs to another model.
        """
        saved = state.get("gates", {})
        if {n: len(g["sums"]) for n, g in saved.items()} != {n: g.rank for n, g in self.gates.items()}:
            raise InputError(
                "state of the component masks",
                f"{len(saved)} factor pairs",
                f"the {len(self.gates)} of this model, of the same ranks",
                "resume the run with its own settings",
            )
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        for name, kept in saved.items():
            self.gates[name].sums, self.gates[name].steps = kept["sums"].clone(), kept["steps"]


def install_component_masks(model: nn.Module, *, steps: int, seed: int = 0, adapter_name: str = "default") -> ComponentMasks:
    """Let the LoRA layers of a PEFT model train with random component masks.

    Args:
        model: a PEFT model with LoRA on linear layers.
        steps: optimiser steps of the whole run; the masks are open at the last one.
        seed: of the draws.
        adapter_name: PEFT's name of the adapter.

    Raises:
        TargetError: no LoRA layer, or layers for which masks are not defined.
    """
    handle = ComponentMasks(steps, seed)
    faults = []
    for name, layer in model.named_modules():
        if not isinstance(layer, peft_layer.LoraLayer) or adapter_name not in layer.lora_A:
            continue
        A: Any = layer.lora_A[adapter_name]
        if type(A) is not nn.Linear or adapter_name in layer.lora_variant:
            faults.append(f"{name}: {type(A).__name__}")
            continue
        handle.gates[name] = gate = Gate(A.out_features, A.weight.device)
        setattr(A, _ATTRIBUTE, gate)
        A.register_forward_hook(_gated)
    if faults or not handle.gates:
        raise TargetError(
            "--component-masks",
            f"{len(faults)} layers cannot take them" if faults else f"no LoRA layer of adapter {adapter_name!r}",
            "plain LoRA on linear layers",
            "choose other --targets, or leave --component-masks off",
            faults=faults,
        )
    return handle


def _gated(A: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    if not A.training:
        return output
    gate: Gate = getattr(A, _ATTRIBUTE)
    return gate.apply(output)
