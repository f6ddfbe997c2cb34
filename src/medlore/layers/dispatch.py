"""Which form computes a layer: a written cost model over its shape and the batch."""

from __future__ import annotations

from typing import Literal

from medlore.layers.expert_call import Job

Form = Literal["merged", "factored", "gathered"]


def choose_form(job: Job) -> Form:
    """The form that costs least for a call."""
    outputs = job.x.numel() // max(job.x.shape[-1] if not job.geometry.stride else job.x.shape[1], 1)
    per_expert = outputs / len(job.shares)
    return "merged" if per_expert > 4 * job.weight.shape[0] else "factored"
