"""Every command on the page for users of the original runs, on tiny data of the same form."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medlore.cli import main
from medlore.files import read_json

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-the-original.md"
COMMANDS = [
    line.strip()
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
WIDTH, DEPTH, PATCH, SIDE = 64, 2, 8, 32


def mmpretrain_vit() -> dict[str, torch.Tensor]:
    """A tiny ViT with the names of an mmpretrain checkpoint."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    state = {
        "backbone.cls_token": draw(1, 1, WIDTH),
        "backbone.pos_embed": draw(1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "backbone.patch_embed.projection.weight": draw(WIDTH, 3, PATCH, PATCH),
        "backbone.patch_embed.projection.bias": draw(WIDTH),
        "backbone.ln1.weight": torch.ones(WIDTH),
        "backbone.ln1.bias": draw(WIDTH),
    }
    for number in range(DEPTH):
        at = f"backbone.layers.{number}."
        for norm in ("ln1", "ln2"):
            state |= {f"{at}{norm}.weight": torch.ones(WIDTH), f"{at}{norm}.bias": draw(WIDTH)}
        shapes = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "ffn.layers.0.0": (2 * WIDTH, WIDTH),
            "ffn.layers.1": (WIDTH, 2 * WIDTH),
        }
        for name, shape in shapes.items():
            state |= {f"{at}{name}.weight": draw(*shape), f"{at}{name}.bias": draw(shape[0])}
    return state


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)).save(folder / name)


def write_endo(folder: Path) -> None:
    """Lists and images of MedFMC endoscopy; the first 18 characters of a name are the study."""
    names = [f"bg_2021.06_{i:07d}_00001.png" for i in range(24)]
    write_images(folder / "images", names)
    lines = [f"{name} " + " ".join(str(int(i % 4 == c)) for c in range(4)) for i, name in enumerate(names)]
    lists = {
        "trainval": lines[:12],
        "test_WithLabel": lines[12:20],
        "endo_1-shot_train_exp1": lines[:4],
        "endo_1-shot_val_exp1": lines[2:12],
    }
    for name, content in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    (folder / "test_WithoutLabel.txt").write_text("\n".join(names[20:]) + "\n")


def write_dtd(folder: Path) -> None:
    names = [f"t{i:03d}.png" for i in range(4 * 47)]
    write_images(folder / "images", names)
    lines = [f"images/{name} {i % 47}" for i, name in enumerate(names)]
    lists = {"train800": lines[:94], "val200": lines[94:141], "train800val200": lines[:141], "test": lines[141:]}
    for name, content in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")


def test_the_page_has_the_commands() -> None:
    assert [shlex.split(c)[1] for c in COMMANDS] == ["ranks", "finetune", "evaluate", "predict", "finetune"]


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": mmpretrain_vit(), "meta": {"epoch": 1}}, tmp_path / "vit.pth")
    write_endo(tmp_path / "data" / "MedFMC" / "endo")
    write_dtd(tmp_path / "data" / "vtab-1k" / "dtd")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        status = main(shlex.split(command)[1:])
        assert status == 0, command + "\n" + capsys.readouterr().err
    plan = read_json(tmp_path / "plan.json")
    assert {layer["part"] for layer in plan["layers"]} == {"q", "v", "o"}
    report = read_json(tmp_path / "runs" / "endo-1-exp1" / "report.json")
    assert report["state"] == "done"
    assert "overlap" in str(report).lower() or "removed" in str(report).lower()
    challenge = next(tmp_path.rglob("endo_1-shot_submission.csv")).read_text().splitlines()
    assert [line.split(",")[0] for line in challenge] == [f"bg_2021.06_{i:07d}_00001.png" for i in range(20, 24)]
