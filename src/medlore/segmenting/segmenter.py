"""Segmentation from Python: `medlore.load_segmenter(PATH).segment("ct.nii.gz", ["liver", "spleen"], modality="ct")`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.volumes.geometry import Array
from medlore.data.volumes.in_memory import volume_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.nifti_affine import AffineChoice
from medlore.data.volumes.preparation import Resample, read_volume
from medlore.errors import InputError, UnknownNameError
from medlore.models.segmenter import bundle as bundles
from medlore.models.segmenter.vocabulary import canonical_modality
from medlore.runs.hardware import DeviceChoice, Precision, Work, decide_hardware
from medlore.segmenting.brain_mask import read_brain_mask
from medlore.segmenting.case_masks import OverlapRule, label_map
from medlore.segmenting.expectations import CheckLevel
from medlore.segmenting.labels import EVERYTHING, route_labels
from medlore.segmenting.mask_formats import NIFTI, checked_formats
from medlore.segmenting.model import SegmentingModel
from medlore.segmenting.outputs import Wanted, fault_of, write_outputs
from medlore.segmenting.plan import Grid
from medlore.segmenting.planner import Choices
from medlore.segmenting.segmentation import Segmentation


class Masks:
    """The masks of one volume, on its own grid unless another was asked for; one bit per voxel and label is held.

    Attributes:
        labels: names, in the order of the label map's values (1, 2, ...), in the vocabulary's spelling.
        affine: voxel index -> RAS+ mm, 4 x 4.
        shape: x y z.
        volumes_ml: label -> millilitres.
        notes: what was odd about the volume and how it was handled.
        verdict: what the checks say; None with `check="none"`.
        segmentation: the full record: plan, experts, windows, seconds.
    """

    def __init__(self, segmentation: Segmentation, *, overlap_rule: OverlapRule, about: dict[str, Any]) -> None:
        self.segmentation = segmentation
        self._rule: OverlapRule = overlap_rule
        self._about = about
        self.labels = segmentation.routes.labels
        self.affine: Array = segmentation.volume.affine if segmentation.affine is None else segmentation.affine
        self.shape = segmentation.reorientation.shape
        voxel_ml = segmentation.voxel_ml()
        self.volumes_ml = {label: segmentation.voxels(label) * voxel_ml for label in self.labels}
        self.notes = segmentation.prepared.notes
        self.verdict = segmentation.verdict

    def __getitem__(self, label: str) -> Array:
        """The mask of a label, Boolean x y z; where labels overlap, each keeps all of its voxels.

        Raises:
            UnknownNameError: the label was not asked for.
        """
        if label not in self.labels:
            raise UnknownNameError("masks", label, self.labels)
        return self.segmentation.mask(label)

    @functools.cached_property
    def label_map(self) -> Array:
        """One integer a voxel, x y z: 0 is background, `labels[i - 1]` is i. The overlap rule decides where labels overlap."""
        return label_map(self.segmentation, self._rule)

    def save(self, folder: str | Path, *, image: bool = True, picture: bool = True, formats: Sequence[str] = (NIFTI.name,)) -> Path:
        """Write what `medlore segment` writes for a case: a mask a label, the label map, tables, a picture, `case.json`.

        Args:
            folder: written whole or not at all; replaced if it is there.
            image: write the image too.
            picture: write `quality_control.png`.
            formats: nifti, dicom-seg, rtstruct, seg-nrrd.

        Raises:
            InputError: an unknown format, or one that needs a DICOM series.
            StepError: the folder cannot be written; or the masks are there and a file beside them is not.
        """
        volume = self.segmentation.volume
        for made in checked_formats(formats):
            if made.check is not None:
                made.check(volume)
        wanted = Wanted(formats, self._rule, image, picture)
        record = write_outputs(folder, self.segmentation, about=self._about, wanted=wanted)
        if (fault := fault_of(record, Path(folder))) is not None:
            raise fault
        return Path(folder)


class LoadedSegmenter:
    """A segmenter on a device, ready for many volumes; made by `load_segmenter`."""

    def __init__(self, model: SegmentingModel) -> None:
        self.model = model

    @property
    def name(self) -> str:
        """`LoRKD-Nano`, `SAT-Pro`, ..."""
        return self.model.bundle.name

    def labels(self, modality: str) -> tuple[str, ...]:
        """Labels that this model can be asked for in a modality.

        Raises:
            UnknownNameError: no such modality.
        """
        try:
            return route_labels(self.model.facts, [EVERYTHING], canonical_modality(modality)).labels
        except UnknownNameError:
            raise
        except InputError:  # no label of that modality
            return ()

    def segment(  # noqa: PLR0913 - each is a choice of the command
        self,
        volume: Any,
        prompts: str | Sequence[str],
        *,
        modality: str | None = None,
        region: str | None = None,
        allow_unknown: bool = False,
        grid: Grid = "original",
        resample: Resample = "probability",
        overlap_rule: OverlapRule = "small-over-large",
        orientation_code: str | None = None,
        affine_from: AffineChoice = "auto",
        frame: int | None = None,
        series: str | None = None,
        brain_mask: str | Path | Array | None = None,
    ) -> Masks:
        """Segment one volume.

        Args:
            volume: a file of any format, a DICOM folder or zip, or an image in memory: a `Volume` from `medlore.read_volume`, a SimpleITK
                or nibabel image, or a pair of an array or tensor (x y z) and its affine (voxel index -> RAS+ mm).
            prompts: names of structures or synonyms, a region's name, or `all`.
            modality: ct, mri (also t1, t2, flair ...), pet or us; DICOM files record it.
            region: this region's expert answers for every label.
            allow_unknown: let labels through that the vocabulary does not know.
            grid: `original` for the volume's own grid, `processed` for the network's.
            resample: how masks return to the volume's grid.
            overlap_rule: who keeps a voxel of the label map that two labels claim.
            orientation_code: in which the network sees the volume, e.g. `ASR`.
            affine_from: which NIfTI matrix to believe.
            frame: which volume of a 4D image.
            series: which DICOM series, where there are several.
            brain_mask: a file, or a Boolean array x y z, on the volume's grid: everything of the brain is looked for inside it.

        Raises:
            InputError: no such file, unknown labels, no modality, or more than fits the memory.
            DataError: a file that cannot be read as one grey volume, or nothing in it.
        """
        if isinstance(volume, str | Path):
            read = read_volume(volume, affine_from=affine_from, frame=frame, series=series)
        else:
            read = volume if isinstance(volume, Volume) else volume_of(volume, affine_from=affine_from, frame=frame)
        modality = modality or read.modality
        if modality is None:
            fix = 'give modality="ct"; only DICOM files record it'
            raise InputError("modality", "none was given", "ct, mri, pet or us", fix)
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        routes = route_labels(self.model.facts, asked, modality, region=region, allow_unknown=allow_unknown)
        brain = brain_mask if isinstance(brain_mask, np.ndarray) or brain_mask is None else read_brain_mask(brain_mask, read)
        result = self.model.segment(
            read, routes.labels, modality, routes=routes, orientation_code=orientation_code, grid=grid, resample=resample, brain=brain
        )
        bundle = self.model.bundle
        about = {
            "image": str(read.path),
            "model": {"name": bundle.name, "sha256": bundle.sha256},
            "precision": self.model.precision,
            "published_rules": self.model.published,
        }
        return Masks(result, overlap_rule=overlap_rule, about=about)


def load_segmenter(  # noqa: PLR0913 - each is a flag of the command
    path: str | Path,
    *,
    device: DeviceChoice = "auto",
    precision: Precision = "auto",
    memory: str | None = None,
    roi_size: tuple[int, int, int] | None = None,
    overlap: float | None = None,
    sw_batch_size: int = 1,
    published: bool = False,
    redraw_tissues: bool = True,
    check: CheckLevel = "quick",
    probabilities: bool = False,
    uncertainty: bool = False,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prompt_embeddings: str | Path | None = None,
    lora_alpha: float | None = None,
) -> LoadedSegmenter:
    """A pack, a published SAT or LoRKD file, or a shipped pack (`medlore:NAME`), ready to segment.

    Args:
        path: pack folder, .pth or .safetensors, or `medlore:NAME`.
        device: auto, cpu, cuda or mps.
        precision: of the network; auto is bf16 where the hardware multiplies it, else fp32.
        memory: what may be used, e.g. `6GiB`; four fifths of what is free unless given.
        roi_size: windows of another size than the model's own.
        overlap: share that neighbouring windows have in common.
        sw_batch_size: windows at a time.
        published: the published rules throughout.
        redraw_tissues: redraw the borders of tissues by grey values, where the model names tissues.
        check: how closely masks are looked at: `none`, `quick`, or `thorough` at three times the time.
        probabilities: keep the probability of each label, so that `Masks.save` writes it.
        uncertainty: keep the entropy of every voxel, so that `Masks.save` writes it.
        text: the published text encoder, for prompts outside a table.
        tokenizer: its wordpiece list.
        prompt_embeddings: a table of prompts for a published file.
        lora_alpha: alpha of a published file with equal ranks.

    Raises:
        InputError: no such file, device or memory size.
        CheckpointError: broken, foreign or partial weights.
    """
    work: Work = "published" if published else "inference"
    hardware = decide_hardware(device, precision, work=work, memory=memory)
    loaded = bundles.load_segmenter(path, text=text, tokenizer=tokenizer, prompt_embeddings=prompt_embeddings, lora_alpha=lora_alpha)
    choices = Choices(roi_size, overlap, sw_batch_size, published=published, redraw_tissues=redraw_tissues, check=check)
    choices = replace(choices, probabilities=probabilities, uncertainty=uncertainty)
    return LoadedSegmenter(SegmentingModel(loaded, hardware, choices))
