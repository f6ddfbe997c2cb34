"""One reader behind every door: the same tensors out of every wrapper, the same sentence for every broken file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medlore.errors import CheckpointError
from medlore.models.backbones.keymaps import read_weights
from medlore.models.statefile import read_state
from medlore.ranks.sources import open_source
from medlore.weightfiles import load_torch_file, read_tensors

DOORS: list[Callable[[Path], Any]] = [open_source, read_weights, read_state, read_tensors]


class Bomb:
    def __reduce__(self) -> object:
        return (os.mkdir, ("bombed",))


def test_wrappers_come_off_and_what_lies_beside_the_weights_stays_out(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    beside = {"epoch": 3, "optimizer": {"state": {0: torch.ones(4)}}}
    for number, content in enumerate([state, {"model_state_dict": state, **beside}, {"state_dict": {"model": state}, **beside}]):
        file = tmp_path / f"{number}.th"
        torch.save(content, file)
        for read in (read_weights, read_state, read_tensors):
            assert {k: v.tolist() for k, v in read(file).items()} == {k: v.tolist() for k, v in state.items()}
        assert open_source(file).read("a.weight").tolist() == state["a.weight"].tolist()


def test_the_form_before_torch_1_6_is_read_too(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "old.pt")["a"].tolist() == [1, 1]


def broken(folder: Path) -> dict[str, tuple[str, Callable[[Path], object]]]:
    def cut(write: Callable[[Path], object]) -> Callable[[Path], object]:
        def writer(file: Path) -> None:
            write(file)
            file.write_bytes(file.read_bytes()[:-40])

        return writer

    return {
        "cut.safetensors": ("not a whole safetensors file", cut(lambda f: save_file({"a": torch.ones(50)}, f))),
        "cut.pth": ("not a whole torch file", cut(lambda f: torch.save({"a": torch.ones(50)}, f))),
        "text.bin": ("not a whole torch file", lambda f: f.write_text("hello")),
        "empty.pt": ("not a whole torch file", lambda f: f.write_bytes(b"")),
        "bomb.pth": (r"a pickle that would run code", lambda f: f.write_bytes(pickle.dumps({"model": Bomb()}))),
        "number.pt": ("no state dict: a int", lambda f: torch.save(3, f)),
        "nothing.ckpt": ("no state dict: keys 'epoch'", lambda f: torch.save({"epoch": 3}, f)),
    }


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "text.bin", "empty.pt", "bomb.pth", "number.pt", "nothing.ckpt"])
def test_every_door_says_the_same_of_a_file_that_cannot_be_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message, write = broken(tmp_path)[name]
    write(tmp_path / name)
    messages = set()
    for door in DOORS:
        with pytest.raises(CheckpointError, match=message) as caught:
            door(tmp_path / name)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert name in messages.pop()
    assert not (tmp_path / "bombed").exists()


def test_a_checkpoint_is_read_whole_where_its_file_may_be_replaced(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "c.pt")
    held = load_torch_file(tmp_path / "c.pt", mapped=False)
    (tmp_path / "c.pt").write_bytes(b"")
    assert held["a"].tolist() == [1, 1]
