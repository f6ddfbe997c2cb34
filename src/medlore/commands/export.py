"""`medlore export`: weights become a pack that says what it is, or one merged expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings, setting

_SEGMENTERS, _BUNDLE = "Segmenters", "monai-bundle"


class ExportCall(Settings):
    """What is written from what."""

    source: Path = setting(..., "Published file, pack, or text encoder.", argument="SOURCE")
    out: Path = setting(..., "Folder of the pack; for a text encoder the .safetensors file of the prompt table.")
    expert: str | None = setting(None, "Write only this expert, merged: a plain network without factors.")
    text: Path | None = setting(
        None, "Text encoder file that belongs to these weights; the whole vocabulary is embedded.", group=_SEGMENTERS
    )
    tokenizer: Path | None = setting(
        None, "vocab.txt or tokenizer.json of BioLORD, MPNet or bert-base-uncased, or its folder.", group=_SEGMENTERS
    )
    prompt_embeddings: Path | None = setting(None, "Existing table of prompts in place of a text encoder.", group=_SEGMENTERS)
    lora_alpha: float | None = setting(
        None, "Alpha of a LoRKD file with equal ranks, which does not record it; default 16.", group=_SEGMENTERS
    )
    modality: str | None = setting(None, "Modality of a MONAI bundle, whose rules and prompts it takes.", group=_SEGMENTERS)
    format: str | None = setting(
        None,
        "Format of an expert: of a classifier safetensors, onnx, torch-export or peft; of a segmenter monai-bundle.",
        words=lambda _: ("safetensors", "onnx", "torch-export", "peft", _BUNDLE),
    )


def export(given: Given) -> None:
    """Write one merged expert of a pack as a plain network; convert a published SAT or LoRKD file into a pack with its prompts."""
    call, output = given.read(ExportCall, Output)
    from medlore.commands.screens import export as screen
    from medlore.decomposing.classifiers.export import export_classifier, is_classifier_pack, required
    from medlore.runs.output_lock import OutputLock
    from medlore.segmenting.export import export as run

    how = {name: getattr(call, name) for name in ("text", "tokenizer", "prompt_embeddings", "lora_alpha")}
    if is_classifier_pack(call.source):
        flags = {given.flags[name]: value for name, value in how.items()}
        _refuse({**flags, "--modality": call.modality}, "given for the pack of a classifier", "--expert and --format")
        expert = required(call.expert, "--expert")
        with OutputLock.beside(call.out):
            found = export_classifier(call.source, expert, call.format or "safetensors", call.out)
        screen.print_classifier_export(found, as_json=output.as_json)
        return
    if call.format == _BUNDLE:
        from medlore.segmenting.monai_bundle import export_monai_bundle

        _refuse({given.flags[name]: value for name, value in how.items()}, "given for a MONAI bundle", "--expert and --modality")
        with OutputLock.beside(call.out):
            bundle = export_monai_bundle(call.source, call.out, expert=call.expert, modality=call.modality)
        screen.print_bundle(bundle, as_json=output.as_json)
        return
    other = {"--format": call.format, "--modality": call.modality}
    _refuse(other, "given for a segmenter", f"--format {_BUNDLE} with a modality, or neither: a pack of safetensors files")
    with OutputLock.beside(call.out):
        summary = run(call.source, call.out, expert=call.expert, **how)
    screen.print_export(summary, as_json=output.as_json)


def _refuse(flags: Mapping[str, object], came: str, accepted: str) -> None:
    """Flags that could not act are refused rather than passed over."""
    from medlore.errors import InputError

    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise InputError(", ".join(given), came, accepted, "leave it out")


app = command(export, ExportCall, Output)
