"""Flags are made from settings: every field has one, one YAML says the same, and all faults of a command come at once."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from medlore.cli import VERBS, main
from medlore.commands.flags import Given, Output, command
from medlore.decomposing.segmenters.few_shot_settings import FewShotSettings
from medlore.errors import InputError
from medlore.files import write_text
from medlore.runs.settings import Settings, Subject, flags_of, setting
from medlore.segmenting.settings import SegmentSettings
from medlore.tuning.scoring_settings import EvaluateSettings, PredictSettings
from medlore.tuning.settings import FinetuneSettings

# Flags of the version before flags were made from settings: scripts that use them go on working.
EARLIER = {
    "collect": "--json --quiet --verbose",
    "decompose": "--out --steps --seed --device --only --add-expert --pack --dry-run --json",
    "demo": "--out --draws --shots --segmenter --json",
    "doctor": "--json",
    "evaluate": "--data --format --split --images --group-pattern --model --bootstrap --seed --device --pred --truth --tolerance --out "
    "--json",
    "export": "--out --expert --text --tokenizer --prompt-embeddings --lora-alpha --format --json",
    "finetune": "--cases --region --steps --data --format --images --test-data --split --task --classes --group-pattern --shots --draw "
    "--official-draw --per --data-seed --validation-shots --model --image-size --mean --std --heads --method --plan --ranks --targets "
    "--granularity --scale --budget --rank --alpha --partial-update --component-masks --bottleneck --prompt-length --last-blocks --dropout "
    "--epochs --batch-size --learning-rate --lr --weight-decay --patience --flip --no-augment --seed --precision --device --out --settings "
    "--resume --overwrite --no-checkpoints --track --track-stable-rank --dry-run --json",
    "info": "--labels --modality --region --lora-alpha --json",
    "predict": "--out --model --device --precision --keep-going --medfmc --json",
    "ranks": "--targets --granularity --rule --ranks --scale --budget --alpha --k --no-k --proof --rounding --min-rank --max-rank "
    "--any-weights --out --plot --peft --seed --json",
    "segment": "--model --out --image --labels --modality --region --expert-by --allow-unknown --orientation --affine --device --amp "
    "--no-amp --precision --memory --roi-size --overlap --sw-batch-size --max-queries --published --grid --resample --redraw-tissues "
    "--no-redraw-tissues --overlap-rule --image-copy --no-image-copy --picture --no-picture --dicom-seg --resume --no-resume --engine "
    "--workers --prompt-embeddings --text --tokenizer --lora-alpha --dry-run --json",
    "study": "--out --only --engine --workers --resume --budget-trials --dry-run --json",
    "view": "--out --open --json",
}  # fmt: skip


def options_of(verb: str) -> set[str]:
    made: Any = typer.main.get_command(importlib.import_module(f"medlore.commands.{verb}").app)
    return {word for parameter in made.params for word in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("verb", VERBS)
def test_flags_of_earlier_versions_are_there_and_a_file_may_say_them(verb: str) -> None:
    assert set(EARLIER[verb].split()) | {"--config"} <= options_of(verb)


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        ("finetune", FinetuneSettings), ("finetune", FewShotSettings), ("segment", SegmentSettings), ("evaluate", EvaluateSettings),
        ("predict", PredictSettings),
    ],
)  # fmt: skip
def test_every_field_has_its_flag(verb: str, kind: type[Settings]) -> None:
    assert {flag for name in kind.fields() for flag in flags_of(kind, name)} <= options_of(verb)


class Loop(Subject):
    """A subject of these tests."""

    title = "Loop"
    epochs: int = setting(20, "Passes.", ge=1)
    crop: tuple[float, float] = setting((0.5, 1.0), "Share that is kept.")
    augment: bool = setting(True, "Change images.")


class Work(Settings):
    """Settings of these tests."""

    source: str = setting(..., "What is read.", argument="SOURCE")
    names: tuple[str, ...] = setting((), "Names.")
    only: tuple[str, ...] = setting((), "Given several times.", repeated=True)
    folder: Path | None = setting(None, "A folder.")
    loop: Loop = Loop()


def run(*words: str) -> tuple[Work, Output]:
    read: list[tuple[Work, Output]] = []

    def work(given: Given) -> None:
        """Do it."""
        read.append(given.read(Work, Output))

    typer.main.get_command(command(work, Work, Output)).main(list(words), standalone_mode=False)
    return read[0]


def test_values_of_every_kind_are_read() -> None:
    line = ["here", "--names", "a, b", "--epochs", "3", "--crop", "0.2,0.9", "--no-augment", "--only", "a=1,2", "--only", "b=3", "--json"]
    settings, output = run(*line)
    assert settings == Work(source="here", names=("a", "b"), only=("a=1,2", "b=3"), epochs=3, crop=(0.2, 0.9), augment=False)
    assert output.as_json
    assert set(settings.stated()) == {"source", "names", "only", "epochs", "crop", "augment"}


@pytest.mark.parametrize("text", ["epochs: 7\naugment: false\n", "loop: {epochs: 7, augment: false}\n"])
def test_a_file_is_nested_or_flat_and_flags_lie_over_it(tmp_path: Path, text: str) -> None:
    file = write_text(tmp_path / "work.yaml", f"source: there\nfolder: data\nnames: [a]\n{text}as_json: true\n")
    settings, output = run("--config", str(file), "--epochs", "5", "here")
    assert settings == Work(source="here", names=("a",), folder=tmp_path / "data", epochs=5, augment=False)
    assert output.as_json


def test_all_faults_of_line_and_file_come_at_once(tmp_path: Path) -> None:
    file = write_text(tmp_path / "work.yaml", "loop:\n  epochs: none\n  epoch: 3\nnoise: 1\n")
    with pytest.raises(InputError) as caught:
        run("--config", str(file), "--crop", "a,1", "--nams=x")
    assert sorted(caught.value.faults) == sorted([
        "--nams: no such option; the nearest are --names, --no-augment, --no-json",
        "line 4, noise: unknown setting; the nearest are verbose, names, quiet",
        "source: Field required",
        "line 2, loop.epochs: Input should be a valid integer, unable to parse string as an integer, got 'none'",
        "line 3, loop.epoch: unknown setting; the nearest are epochs, crop, augment",
        "crop.0: Input should be a valid number, unable to parse string as a number, got 'a'",
    ])  # fmt: skip


def test_a_word_too_many_is_named() -> None:
    with pytest.raises(InputError, match="'there': unexpected argument"):
        run("here", "there")


def test_help_shows_defaults_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    printed = capsys.readouterr().out
    for words in ("Backbone", "Method and ranks", "Training", "Augmentation", "[default: 0.05]", "[default: sr-lora]", "Segmenter: a pack"):
        assert words in printed


def test_an_unknown_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segmnt"]) == 2
    assert "unknown name 'segmnt'. Accepted: 13 names; the nearest are 'segment'" in capsys.readouterr().err


def test_help_lists_the_verbs_with_their_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for verb in VERBS:
        first = str(getattr(importlib.import_module(f"medlore.commands.{verb}"), verb).__doc__).split("\n")[0]
        assert f"{verb} {first}" in printed


def image_folders(root: Path) -> Path:
    for part, count in (("train", 3), ("test", 2)):
        for grey, name in ((40, "dark"), (200, "bright")):
            for i in range(count):
                place = root / part / name / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), grey + i).save(place)
    return root


def test_a_run_without_a_folder_takes_the_next_free_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["finetune", "--data", str(image_folders(tmp_path / "images")), "--method", "linear-probe", "--epochs", "1", "--bootstrap", "0"]
    assert main([*line, "--heads", "3"]) == 2  # nothing is left of a run that was refused
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "runs" / "images-linear-probe-1").mkdir()
    assert main(line) == 0
    assert "writing to runs/images-linear-probe-2" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "images-linear-probe-2" / "report.json").read_text())["state"] == "done"


def test_flags_of_images_are_refused_for_a_segmenter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "pack", "--cases", "c.jsonl", "--shots", "3", "--epochs", "2", "--steps", "0"]) == 2
    printed = capsys.readouterr().err
    assert "3 faults" in printed
    assert "--shots: is for images: given for a segmenter" in printed
    assert "steps: Input should be greater than or equal to 1" in printed


TOY = """
import sys
from dataclasses import dataclass
from typing import Annotated
from pydantic import Field
from medlore.layers.tuning.methods import METHODS, Method

@dataclass(frozen=True)
class ToyOptions:
    stripes: Annotated[int, Field(ge=1, description="Stripes of the toy.")] = 3

def install(model, request, options):
    from medlore.layers.tuning.own_weights import bitfit
    print("stripes", options.stripes)
    return bitfit(model, request)

METHODS["toy"] = Method(install, None, 1e-3, "a toy", ToyOptions)
from medlore.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_method_with_an_option_of_its_own_is_one_object(tmp_path: Path) -> None:
    def toy(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", TOY, "finetune", *words], capture_output=True, text=True, timeout=240, check=False)

    data = str(image_folders(tmp_path / "images"))
    assert "Stripes of the toy. Only for toy." in " ".join(toy("--help").stdout.replace("│", " ").split())
    idle = toy("--data", data, "--method", "lora", "--stripes", "4", "--dry-run")
    assert "--stripes: can have no effect: only --method toy takes it" in idle.stderr
    wrong = toy("--data", data, "--method", "toy", "--stripes", "0", "--dry-run")
    assert "stripes: Input should be greater than or equal to 1" in wrong.stderr
    done = toy("--data", data, "--method", "TOY", "--stripes", "5", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "stripes 5" in done.stdout
