"""The pack of a segmenter's teacher whose training is still going on, or was broken off: the averaged weights of its last checkpoint.

    python -m maintenance.pack_of_checkpoint studies/seg-mini-finder.yaml --run runs/brain/finder --out runs/brain/finder-so-far

The training is not touched. The pack says after how many steps of how many it was taken; the rate had then not come down to its end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from medlore.decomposing.segmenters.context import open_context
from medlore.decomposing.segmenters.packs import write_trained_pack
from medlore.decomposing.segmenters.study import new_teacher, read_study
from medlore.decomposing.stored_weights import as_stored
from medlore.errors import CheckpointError


def pack_of_checkpoint(study: Path, run: Path, out: Path) -> tuple[Path, int]:
    """Write the pack; returns it and the step of the checkpoint.

    Args:
        study: of the training.
        run: its output folder.
        out: the pack.

    Raises:
        CheckpointError: no checkpoint, or several.
    """
    found = sorted((run / "networks" / "teacher").glob("checkpoint-*.pt"))
    if len(found) != 1:
        raise CheckpointError(str(run), f"{len(found)} checkpoints of a teacher", "one", "name the run whose teacher is in training")
    settings = read_study(study)
    context = open_context(settings, folder=study.resolve().parent, out=run)
    network = new_teacher(context)
    state = torch.load(found[0], map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    for name, parameter in network.named_parameters():
        if name in state["average"]:
            parameter.data.copy_(state["average"][name])
    as_stored(network, settings.weights)
    step = int(state["step"])
    return write_trained_pack(out, network, context.cohort, settings, role=f"teacher, after step {step} of {settings.teacher.steps}"), step


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study of the training")
    parser.add_argument("--run", type=Path, required=True, help="its output folder")
    parser.add_argument("--out", type=Path, required=True, help="the pack")
    arguments = parser.parse_args(argv)
    pack, step = pack_of_checkpoint(arguments.study, arguments.run, arguments.out)
    sys.stdout.write(f"{pack}: after step {step}\n")


if __name__ == "__main__":
    main()
