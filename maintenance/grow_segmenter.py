"""A plain, wider network that begins where one expert of a pack stands: the start of a further training.

    python -m maintenance.grow_segmenter --pack medlore:seg-mini --region brain --features 16,32,64,128,128 --out runs/brain/start

The network of the region's expert is merged, and every stage gets the asked channels: old channels answer as before, since nothing that is
new is read by them yet (its outgoing weights are zero); new channels have drawn incoming weights, so that they can begin to be of use with
the first gradient. Full resolution keeps its width: there the time goes, and the deep stages are nearly free. Prompts that the pack lacks
begin at the mean of the known ones that `maintenance.seg_mini_prompts` names, or are taken from a table that it has fitted (`--prompts`).

Source: widening that keeps the function, after Chen, Goodfellow and Shlens, "Net2Net" (2016); zero outgoing weights in place of copies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from maintenance.seg_mini_prompts import STARTS
from medlore.errors import InputError
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter, write_segmenter_pack
from medlore.models.segmenter.checkpoints import SegmenterWeights
from medlore.models.segmenter.network import Segmenter, SegmenterConfig
from medlore.models.segmenter.prompts import PromptTable


@torch.no_grad()
def grown(small: Segmenter, config: SegmenterConfig, *, seed: int = 0) -> Segmenter:
    """A wider network with the answers of a smaller one.

    Args:
        small: a plain network.
        config: as the smaller one's, with `features` at least as wide and any `deep_widths`; the first width is the same.
        seed: of the draw of what is new.

    Raises:
        InputError: other sizes, or narrower ones.
    """
    before = small.config
    same = replace(config, features=before.features, deep_widths=before.deep_widths) == before
    wide = len(config.features) == len(before.features) and all(a >= b for a, b in zip(config.features, before.features, strict=True))
    if not (same and wide and config.features[0] == before.features[0]):
        accepted = f"the sizes of {list(before.features)}, wider from the second stage on"
        raise InputError("features", str(list(config.features)), accepted, "give as many widths, the first unchanged")
    torch.manual_seed(seed)
    large = Segmenter(config, dropout=0.0)
    old = small.state_dict()
    for name, own in large.state_dict().items():
        if name in old:
            own.copy_(_placed(name, old[name], own, before.features, config.features))
    return large


def _placed(name: str, old: Tensor, drawn: Tensor, few: Sequence[int], many: Sequence[int]) -> Tensor:
    """A tensor of the wide network: old entries at their places, nothing from new inputs to old outputs, the rest as drawn."""
    if old.shape == drawn.shape:
        return old
    if old.dim() == 1:
        drawn[: len(old)] = old
        return drawn
    outputs, inputs = (1, 0) if ".transpconvs." in name else (0, 1)  # a transposed convolution has its inputs first
    places = _input_places(name, old.shape[inputs], drawn.shape[inputs], few, many)
    rows = torch.arange(old.shape[outputs])
    found = drawn.movedim((outputs, inputs), (0, 1)).clone()
    found[rows] = 0
    found[rows[:, None], places[None]] = old.movedim((outputs, inputs), (0, 1))
    return found.movedim((0, 1), (outputs, inputs)).contiguous()


def _input_places(name: str, before: int, after: int, few: Sequence[int], many: Sequence[int]) -> Tensor:
    """Where the old inputs of a layer lie among the new ones: joined maps are widened part by part."""
    if name == "projection_layer.0.weight":
        starts = [sum(many[:i]) for i in range(len(many))]
        return torch.cat([start + torch.arange(n) for start, n in zip(starts, few, strict=True)])
    if "decoder.stages" in name and ".convs.0." in name:  # what came up, then the encoder's map
        return torch.cat([torch.arange(before // 2), after // 2 + torch.arange(before // 2)])
    return torch.arange(before)


def with_new_prompts(bundle: SegmenterBundle, fitted: Path | None) -> PromptTable:
    """The pack's prompts of MR and those that a further training asks beside them."""
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # a trained pack has them
    rows = {k: r for k, r in zip(bundle.prompts.keys, bundle.prompts.embeddings.float(), strict=True) if k.startswith("mri/")}
    rows |= {f"mri/{new}": bundle.queries(list(known), "mri").float().mean(0) for new, known in STARTS.items()}
    if fitted is not None:
        table = PromptTable.read(fitted)
        rows |= {key: row for key, row in zip(table.keys, table.embeddings.float(), strict=True) if key in rows}
    return PromptTable(tuple(rows), torch.stack(list(rows.values())))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and write the pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", default="medlore:seg-mini", help="pack folder or medlore:NAME")
    parser.add_argument("--region", default="brain", help="whose expert is merged")
    parser.add_argument("--features", default="16,32,64,128,128", help="channels of each stage")
    parser.add_argument("--deep-widths", default="64,64", help="hidden widths of the heads of deep supervision, by comma; empty for none")
    parser.add_argument("--prompts", type=Path, help="a fitted table of maintenance.seg_mini_prompts")
    parser.add_argument("--out", type=Path, required=True, help="the new pack")
    arguments = parser.parse_args(argv)
    bundle = load_segmenter(arguments.pack)
    small = bundle.network(arguments.region if bundle.weights.experts else None)
    features, deep = (tuple(int(v) for v in text.split(",") if v) for text in (arguments.features, arguments.deep_widths))
    large = grown(small, replace(small.config, features=features, deep_widths=deep))
    weights = SegmenterWeights(large.config, dict(large.state_dict()), {})
    preprocessing = {k: v for k, v in bundle.preprocessing.items() if k != "first_pass"}
    about = {"start": arguments.pack, "region": arguments.region, "role": "start of a further training"}
    write_segmenter_pack(
        arguments.out, weights, prompts=with_new_prompts(bundle, arguments.prompts), preprocessing=preprocessing, about=about
    )
    sys.stdout.write(f"{arguments.out}: {sum(t.numel() for t in weights.base.values()):,} parameters\n")


if __name__ == "__main__":
    main()
