"""One merged expert as a MONAI bundle: `python -m monai.bundle run --config_file configs/inference.json` needs no MedLoRE.

The network, its prompts and its window function are one TorchScript file; everything else is transforms of MONAI, written into
`inference.json`: orientation, spacing, grey values, the crop to the body, windows, and the way back to the grid of the image. What
a pack asks for beyond its network (a first pass, tissues redrawn by grey values, stray parts dropped) is not in a bundle, and is named.

Source: bundle layout and configuration language of MONAI; the rules are those of `medlore.data.volumes.preparation.prepare`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medlore.data.volumes.intensity import BODY_HU, BODY_SHARE, PERCENTILES, IntensityRule, rule_of
from medlore.data.volumes.windows import gaussian
from medlore.errors import InputError, StepError, UnknownNameError
from medlore.files import atomic_folder, sha256_of, write_json
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter
from medlore.models.segmenter.network import Segmenter
from medlore.models.segmenter.vocabulary import canonical_modality
from medlore.runs.hardware import decide_hardware
from medlore.segmenting.labels import ModelFacts, Routes, facts_of_bundle, route_labels
from medlore.segmenting.pace import EMPTY_SHARE
from medlore.segmenting.plan import WindowRules
from medlore.segmenting.planner import Choices, Planner

FORMAT = "monai-bundle"
_BEYOND = (
    ("first_pass", "a first pass that cuts out the brain: give images without skull"),
    ("tissues", "tissues redrawn by grey values"),
    ("parts", "stray parts dropped"),
)
_TESTED_MONAI = "1.6.1"


class WindowModel(nn.Module):
    """Windows -> probabilities times the window function, and the window function itself: their quotient is the blended probability.

    Args:
        network: merged, of one region.
        queries: (q, width), of the labels.
        roi_size: of a window.
    """

    queries: Tensor
    weights: Tensor

    def __init__(self, network: Segmenter, queries: Tensor, roi_size: Sequence[int]) -> None:
        super().__init__()
        self.network, self._channels = network, network.config.image_channels
        self.register_buffer("queries", queries[None])
        x, y, z = (gaussian(size).float() for size in roi_size)
        self.register_buffer("weights", x[:, None, None] * y[:, None] * z)

    def forward(self, window: Tensor) -> Tensor:
        """One window (1 3 x y z: grey values, body, inside of the image) -> 1 q+1 x y z."""
        pixels, body, inside = window[:, :1], window[:, 1:2], window[:, 2:3]
        features = self.network.encode(pixels.expand(-1, self._channels, -1, -1, -1))
        embeddings = self.network.mask_embeddings(features, self.queries[0])
        logits = torch.einsum("bnc,bcxyz->bnxyz", embeddings, features.pixels)
        holds = (body.sum() >= EMPTY_SHARE * inside.sum()).to(logits.dtype)  # a window of air counts as nothing
        return torch.cat([logits.sigmoid() * holds * self.weights, self.weights[None, None]], dim=1)


def export_monai_bundle(source: str | Path, out: str | Path, *, expert: str | None, modality: str | None) -> dict[str, Any]:
    """Write the bundle of one expert for one modality.

    Args:
        source: pack or published file with prompts inside.
        out: folder of the bundle.
        expert: region of the expert; None for a model without experts.
        modality: for which its rules and prompts are taken; may be left out where the pack has prompts of one alone.

    Returns:
        What was written: kind, path, labels, modality, files, what of the pack is not in it, and the largest difference of the
        traced network from the pack's own.

    Raises:
        InputError: no such expert, no or several modalities.
        StepError: the traced network gives other numbers than the pack's own.
    """
    bundle = load_segmenter(source)
    facts = facts_of_bundle(bundle)
    routes, region = _routes(facts, bundle, expert, modality)
    rules = Planner(facts, decide_hardware("cpu", "fp32", work="inference"), Choices()).rules(routes.modality)
    model = WindowModel(bundle.network(region), bundle.queries(routes.labels, routes.modality).float(), rules.roi_size).eval()
    with atomic_folder(out) as folder:
        for name in ("configs", "models", "docs"):
            (folder / name).mkdir()
        apart = _write_network(folder / "models" / "model.ts", model, rules.roi_size)
        beyond = [text for name, text in _BEYOND if _asks(bundle.preprocessing, name, routes.modality)]
        write_json(folder / "configs" / "inference.json", _inference(rules, rule_of(bundle.preprocessing), routes, facts))
        write_json(folder / "configs" / "metadata.json", _metadata(bundle, routes, region, beyond, folder / "models" / "model.ts"))
        (folder / "docs" / "README.md").write_text(_readme(bundle, routes, beyond), encoding="utf-8")
    files = sorted(str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file() and not path.name.startswith("."))
    notes = [f"not in the bundle: {text}" for text in beyond]
    return {
        "kind": "MONAI bundle", "out": str(out), "name": bundle.name, "expert": region, "modality": routes.modality,
        "labels": list(routes.labels), "files": files, "largest_difference": apart, "notes": notes,
    }  # fmt: skip


def _routes(facts: ModelFacts, bundle: SegmenterBundle, expert: str | None, modality: str | None) -> tuple[Routes, str | None]:
    """The labels of the expert, and the region by which its network is asked for."""
    if facts.experts and expert is None:
        fix = f"give --expert, one of {', '.join(facts.experts)}"
        raise InputError("--expert", "none was given", "one expert: a bundle is one plain network", fix)
    if expert is not None and expert not in facts.experts and expert != facts.region:
        raise UnknownNameError("--expert", expert, facts.experts or [facts.region or "none"])
    if facts.prompts is None:
        raise InputError(str(bundle.source), "no prompts inside", "a pack with prompts", "export it with --text first")
    there = sorted({key.split("/")[0] for key in facts.prompts})
    if modality is None and len(there) != 1:
        raise InputError("--modality", "none was given", f"one of {', '.join(there)}: rules and prompts differ", "give --modality")
    kind = canonical_modality(modality or there[0])
    everything = route_labels(facts, ["all"], kind)
    region = expert or facts.region
    labels = tuple(label for label in everything.labels if region is None or label in everything.by_region.get(region, ()))
    if not labels:
        raise InputError(
            "--expert, --modality", f"no label of {region} in {kind}", "an expert with prompts of the modality", "choose another"
        )
    return Routes(kind, labels, {region or "all regions": list(labels)}), region


def _asks(preprocessing: Mapping[str, Any], name: str, modality: str) -> bool:
    rule = preprocessing.get(name)
    return bool(modality == "mri" and rule if name == "first_pass" else (rule or {}).get(modality))


def _write_network(path: Path, model: WindowModel, roi_size: Sequence[int]) -> float:
    """Trace, save, load again and compare with the pack's own network; returns the largest difference of a probability."""
    generator = torch.Generator().manual_seed(0)
    window = torch.cat([torch.randn(1, 1, *roi_size, generator=generator), torch.ones(1, 2, *roi_size)], dim=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: sizes are those of a window
        traced = torch.jit.trace(model, window, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), str(path))
        other = torch.randn(window.shape, generator=generator)
        other[:, 1:] = 1
        apart = float((torch.jit.load(str(path))(other) - model(other)).abs().max())
    if not apart < 1e-4:
        raise StepError(
            str(path), f"a traced network that is {apart:.2g} off", "the numbers of the pack", "report this as a fault of MedLoRE"
        )
    return apart


# -- what MONAI reads --------------------------------------------------------------------------------------------------


def _inference(rules: WindowRules, grey: IntensityRule, routes: Routes, facts: ModelFacts) -> dict[str, Any]:
    """The configuration: expressions begin with `$`, references with `@`; a lambda gets references as defaults, for it sees no others."""
    threshold = float(facts.preprocessing.get("threshold", 0.5))
    roi = list(rules.roi_size)
    size = {"keys": "image", "spatial_size": roi, "method": "end", "mode": "constant", "value": "$float('nan')"}
    grid = {"keys": "grid", "func": "@on_spacing", "track_meta": False, "allow_missing_keys": True}
    spaced = {"keys": "image", "dst_keys": "grid", "mode": "bilinear", "padding_mode": "border", "align_corners": True}
    saved = [
        {"_target_": "SaveImaged", "keys": f"pred_{index}", "output_dir": "@output_dir", "output_postfix": name, "resample": False,
         "output_dtype": "$np.uint8", "separate_folder": True, "print_log": False}
        for index, name in enumerate(_safe(routes.labels))
    ]  # fmt: skip
    return {
        "imports": ["$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "image": "image.nii.gz",
        "datalist": "$[{'image': path} for path in (@image if isinstance(@image, list) else [@image])]",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        # the first voxel stays where it is; MONAI's own Spacing keeps the centre of the image
        "on_spacing": "$lambda x: torch.as_tensor(np.asarray(x.affine).dot(np.diag([*(np.array("
        f"{list(rules.spacing_mm)}) / np.linalg.norm(np.asarray(x.affine)[:3, :3], axis=0)), 1.0])))",
        **_grey_values(grey, routes.modality),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "dtype": "$np.float32"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": rules.orientation_code, "labels": None},
                {"_target_": "CopyItemsd", "keys": "image", "names": "grid"},
                {"_target_": "Lambdad", **grid},
                {"_target_": "SpatialResampled", **spaced},
                {"_target_": "CopyItemsd", "keys": "image", "names": "raw"},
                {"_target_": "Lambdad", "keys": "image", "func": "@prepare"},
                {"_target_": "CropForegroundd", "keys": "image", "source_key": "raw", "select_fn": "@body", "allow_smaller": True},
                {"_target_": "DeleteItemsd", "keys": ["raw", "grid"]},
                {"_target_": "SpatialPadd", **size},
                {"_target_": "Lambdad", "keys": "image", "func": "@filled"},
            ],
        },
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": roi, "sw_batch_size": 1, "overlap": rules.overlap, "mode": "constant",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x[:-1] / x[-1:]"},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False,
                 "to_tensor": True},
                {"_target_": "AsDiscreted", "keys": "pred", "threshold": threshold},
                {"_target_": "SplitDimd", "keys": "pred", "output_postfixes": [str(index) for index in range(len(routes.labels))]},
                *saved,
            ],
        },
        "segment": "$lambda item, pre=@preprocessing, post=@postprocessing, net=@network, infer=@inferer, device=@device: "
        "(lambda d: post({**d, 'pred': infer(d['image'][None].to(device), net)[0].cpu()}))(pre(item))",
        "initialize": ["$torch.set_grad_enabled(False)"],
        "run": ["$list(map(@segment, @datalist))"],
    }  # fmt: skip


def _grey_values(rule: IntensityRule, modality: str) -> dict[str, str]:
    """Expressions: grey values of a spaced image -> normalised values and body, two channels; and the box of the body."""
    if modality == "ct":
        low, high = rule.ct_range_hu
        limits, body = f"$lambda f: ({low!r}, {high!r}, {BODY_HU!r})", f"$lambda x: x > {BODY_HU!r}"
    else:
        share = f"low + {BODY_SHARE!r} * (high - low)"
        limits = f"$lambda f: (lambda low, high: (low, high, {share}))(*np.percentile(f, {list(rule.percentiles)!r}))"
        sample = "x.numpy()[:, ::2, ::2, ::2] if x.numel() > 2097152 else x.numpy()"
        body = f"$lambda x: x > float(np.percentile({sample}, {PERCENTILES[0]!r}))"
    above = repr(rule.foreground_above)
    return {
        "box": "$lambda m: tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(m))",
        "limits": limits,
        "body": body,
        "foreground": f"$lambda v, box=@box: v[box(v > {above})] if (v > {above}).any() else v",
        "moments": "$lambda f, low, high: (np.clip(f, low, high).mean(dtype=np.float64), np.clip(f, low, high).std(dtype=np.float64))",
        "channels": "$lambda v, low, high, body, mean, sd: np.stack([(np.clip(v, low, high) - mean) / sd, v > body]).astype(np.float32)",
        "prepare": "$lambda x, foreground=@foreground, limits=@limits, moments=@moments, channels=@channels: (lambda v: (lambda f: (lambda "
        "low, high, body: x * 0 + torch.as_tensor(channels(v, low, high, body, *moments(f, low, high))))(*limits(f)))(foreground(v)))"
        "(x[0].numpy())",
        "filled": "$lambda x: torch.cat([torch.nan_to_num(x[:1], nan=float(x[:1][~torch.isnan(x[:1])].min())), "
        "torch.nan_to_num(x[1:], nan=0.0), (~torch.isnan(x[:1])).to(x.dtype)])",
    }


def _safe(labels: Sequence[str]) -> list[str]:
    from medlore.segmenting.outputs import file_names

    return [name.removesuffix(".nii.gz") for name in file_names(labels, style="safe").values()]


def _metadata(bundle: SegmenterBundle, routes: Routes, region: str | None, beyond: Sequence[str], model: Path) -> dict[str, Any]:
    import numpy as np

    names = _safe(routes.labels)
    planes = {str(index): label for index, label in enumerate(routes.labels)}
    image = {"type": "image", "format": "hounsfield" if routes.modality == "ct" else "magnitude", "modality": routes.modality.upper()}
    return {
        "version": "1.0.0",
        "monai_version": _TESTED_MONAI,
        "pytorch_version": str(torch.__version__).split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.3"},
        "name": f"{bundle.name}, {region or 'all regions'}, {routes.modality}",
        "task": f"Segmentation of {len(routes.labels)} structures in {routes.modality}",
        "description": "One expert of a MedLoRE pack, merged into a plain network. Research software, not a medical device.",
        "intended_use": "Research; not for diagnosis.",
        "pack": {"name": bundle.name, "sha256": bundle.sha256, "expert": region, "model_sha256": sha256_of(model)},
        "not_in_the_bundle": list(beyond),
        "files": dict(zip(routes.labels, names, strict=True)),
        "network_data_format": {
            "inputs": {"image": {**image, "num_channels": 3, "spatial_shape": ["*", "*", "*"], "dtype": "float32", "is_patch_data": True,
                                 "channel_def": {"0": "grey values", "1": "body", "2": "inside of the image"}}},
            "outputs": {"pred": {"type": "image", "format": "segmentation", "num_channels": len(routes.labels) + 1, "dtype": "float32",
                                 "is_patch_data": True, "channel_def": {**planes, str(len(planes)): "window function"}}},
        },
    }  # fmt: skip


def _readme(bundle: SegmenterBundle, routes: Routes, beyond: Sequence[str]) -> str:
    left = "".join(f"- not in this bundle: {text}\n" for text in beyond)
    return (
        f"# {bundle.name}: {', '.join(routes.labels)} ({routes.modality})\n\n"
        "Needs MONAI, PyTorch and nibabel. From the folder of this bundle:\n\n"
        "    python -m monai.bundle run --config_file configs/inference.json --image IMAGE.nii.gz\n\n"
        "writes one mask a label below `eval/`, on the grid of the image (`--output_dir` names another folder).\n"
        f"CT must be in Hounsfield units: MedLoRE corrects a lost intercept, this bundle does not.\n{left}\n"
        "Research software, not a medical device.\n"
    )
