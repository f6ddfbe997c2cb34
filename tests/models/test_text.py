from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from golden.formula import formula_weight, read_key_list
from golden.published import write_published
from medlore.errors import CheckpointError, InputError
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.text import LORKD_TOKENS, TextEncoder, padded, prompt_ids, read_text_encoder, read_wordpieces

WORDS = ["left", "kid", "##ney", "liver", "white", "matter", "(", ")", "c", "##1"]
# MPNet's list: four marks, then BERT's list, then <mask>; [UNK], [CLS] and [SEP] land at 104, 105, 106.
BERT_LIST = ["[PAD]", *[f"[unused{i}]" for i in range(99)], "[UNK]", "[CLS]", "[SEP]", *WORDS]
MPNET_LIST = ["<s>", "<pad>", "</s>", "<unk>", *BERT_LIST, "<mask>"]
WIDTH = 24


def text_shapes(words: int = len(MPNET_LIST), width: int = WIDTH, layers: int = 2, heads: int = 4) -> dict[str, tuple[int, ...]]:
    """The published names, for a tower of any size."""
    inner = 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (words, width),
        "embeddings.position_embeddings.weight": (514, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for part in "qkvo":
            shapes |= {f"{layer}.attention.attn.{part}.weight": (width, width), f"{layer}.attention.attn.{part}.bias": (width,)}
        shapes |= {f"{layer}.attention.LayerNorm.weight": (width,), f"{layer}.attention.LayerNorm.bias": (width,)}
        shapes |= {f"{layer}.intermediate.dense.weight": (inner, width), f"{layer}.intermediate.dense.bias": (inner,)}
        shapes |= {f"{layer}.output.dense.weight": (width, inner), f"{layer}.output.dense.bias": (width,)}
        shapes |= {f"{layer}.output.LayerNorm.weight": (width,), f"{layer}.output.LayerNorm.bias": (width,)}
    shapes |= {"encoder.relative_attention_bias.weight": (32, heads), "pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    named = {f"module.text_tower.biolord.{name}": shape for name, shape in shapes.items()}
    for i in (0, 2):
        named |= {f"module.projection_layer.{i}.weight": (width, width), f"module.projection_layer.{i}.bias": (width,)}
    return {**named, "module.modality_embed.weight": (4, width)}


@pytest.fixture(scope="module")
def text_state() -> dict[str, Tensor]:
    return {name: formula_weight(name, shape) for name, shape in text_shapes().items()}


@pytest.fixture(scope="module")
def text_file(text_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("text") / "nano_text_encoder.pth", text_state)


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(MPNET_LIST) + "\n")
    return path


def test_the_file_of_these_tests_has_the_published_keys(golden: Path) -> None:
    assert text_shapes(30527, 768, 12, 12) == read_key_list(golden / "lorkd_keys_text_encoder.txt")


def test_the_published_keys_load_whole(golden: Path) -> None:
    """Sizes are read from the true shapes; the weights take no memory."""
    state = {n.removeprefix("module."): torch.zeros(1).expand(s) for n, s in read_key_list(golden / "lorkd_keys_text_encoder.txt").items()}
    encoder = TextEncoder(state)
    assert encoder.width == 768
    assert sum(p.numel() for p in encoder.tower.parameters()) == 109_486_464
    assert sum(p.numel() for p in encoder.parameters()) == 109_486_464 + 1_184_256


def test_ids_are_those_of_the_published_embeddings(vocab: Path) -> None:
    pieces = read_wordpieces(vocab)
    start = 4 + 100 + 3
    assert pieces("Left Kidney") == [start, start + 1, start + 2]
    assert pieces("xyzzy") == [104]
    assert prompt_ids(pieces("liver")) == [105, start + 3, 106]
    assert prompt_ids(range(1000, 1300)) == [105, *range(1000, 1254), 106]
    assert len(prompt_ids(range(254))) == 256


@pytest.mark.parametrize("form", ["mpnet.txt", "bert.txt", "tokenizer.json", "folder"])
def test_every_form_of_the_word_list_gives_the_same_ids(form: str, tmp_path: Path, vocab: Path) -> None:
    path = tmp_path / form
    if form == "bert.txt":
        path.write_text("\n".join(BERT_LIST))
    elif form == "tokenizer.json":
        path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(MPNET_LIST)}}}))
    else:
        path = vocab.parent if form == "folder" else vocab
    assert read_wordpieces(path)("white matter (c1) kidney?") == read_wordpieces(vocab)("white matter (c1) kidney?")


def test_other_word_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]))
    with pytest.raises(CheckpointError, match=r"\[3, 1, 2\].*104, 105, 106"):
        read_wordpieces(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="--tokenizer"):
        read_wordpieces(tmp_path / "absent.txt")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"model\.vocab"):
        read_wordpieces(tmp_path / "tokenizer.json")


def test_a_list_of_another_language_is_refused(text_file: Path, tmp_path: Path) -> None:
    """Other lists of BERT's kind have their marks at the same places; their length gives them away."""
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_LIST, "foie"]))
    with pytest.raises(CheckpointError, match=f"{len(BERT_LIST)} lines"):
        read_text_encoder(text_file, tokenizer=tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(MPNET_LIST[:-1]))
    assert read_text_encoder(text_file, tokenizer=tmp_path).embed(["liver"], "ct").shape == (1, WIDTH)


def test_padding_is_zero_and_masked() -> None:
    ids, mask = padded([[105, 7, 106], [105, 106]])
    assert ids.tolist() == [[105, 7, 106], [105, 106, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_embeddings_are_pooled_projected_and_shifted_by_modality(text_file: Path, text_state: dict[str, Tensor], vocab: Path) -> None:
    """Against transformers' own model, one prompt at a time, without any padding."""
    from transformers import MPNetConfig, MPNetModel

    config = MPNetConfig(
        vocab_size=len(MPNET_LIST),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=514,
        layer_norm_eps=1e-5,
    )
    tower = MPNetModel(config).eval()
    prefix = "module.text_tower.biolord."
    tower.load_state_dict({n.removeprefix(prefix): w for n, w in text_state.items() if n.startswith(prefix)}, strict=False)
    encoder = read_text_encoder(text_file, tokenizer=vocab)
    labels = ["Left Kidney", "liver", "white matter (c1)"]

    def by_hand(label: str, row: int) -> Tensor:
        ids = torch.tensor([prompt_ids(read_wordpieces(vocab)(label.lower()))])
        x: Any = tower(input_ids=ids).last_hidden_state.mean(1)
        for i in (0, 2):
            x = x @ text_state[f"module.projection_layer.{i}.weight"].T + text_state[f"module.projection_layer.{i}.bias"]
            x = torch.nn.functional.gelu(x) if i == 0 else x
        return x[0] + text_state["module.modality_embed.weight"][row]

    with torch.no_grad():
        for modality, row in (("ct", 0), ("flair", 1), ("us", 2), ("pet", 3)):
            expected = torch.stack([by_hand(label, row) for label in labels])
            torch.testing.assert_close(encoder.embed(labels, modality), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(encoder.embed(labels, modality, batch_size=2), expected, atol=1e-5, rtol=1e-5)


def test_the_epsilon_of_the_norms_is_that_of_mpnet(text_state: dict[str, Tensor], vocab: Path, tmp_path: Path) -> None:
    """1e-5, as in the configuration of BioLORD; transformers' default (1e-12) shows where the words' vectors are small."""
    from transformers import MPNetConfig, MPNetModel

    small = {n: w * 1e-3 if "embeddings.weight" in n and "modality" not in n else w for n, w in text_state.items()}
    encoder = read_text_encoder(write_published(tmp_path / "small.pth", small), tokenizer=vocab)
    sizes = {"vocab_size": len(MPNET_LIST), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    prefix = "module.text_tower.biolord."
    hidden = {}
    ids = torch.tensor([[105, 111, 106]])
    for epsilon in (1e-5, 1e-12):
        tower = MPNetModel(MPNetConfig(**sizes, intermediate_size=4 * WIDTH, max_position_embeddings=514, layer_norm_eps=epsilon)).eval()
        tower.load_state_dict({n.removeprefix(prefix): w for n, w in small.items() if n.startswith(prefix)}, strict=False)
        with torch.no_grad():
            hidden[epsilon] = tower(input_ids=ids).last_hidden_state
    with torch.no_grad():
        ours = encoder.tower(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours, hidden[1e-5], atol=1e-6, rtol=1e-6)
    assert (ours - hidden[1e-12]).abs().max() > 1e-2


def test_prompts_are_cut_where_each_model_cuts_them(text_file: Path, vocab: Path) -> None:
    long = " ".join(["liver"] * 200)
    encoder = read_text_encoder(text_file, tokenizer=vocab)
    assert encoder.max_tokens == 256
    whole = encoder.embed([long], "ct")
    assert torch.equal(whole, encoder.embed([" ".join(["liver"] * 254)], "ct")) is False
    encoder.max_tokens = LORKD_TOKENS
    cut = encoder.embed([long], "ct")
    assert torch.equal(cut, encoder.embed([" ".join(["liver"] * 62)], "ct"))
    assert not torch.allclose(cut, whole)
    assert prompt_ids(range(1000, 1300), most=64) == [105, *range(1000, 1062), 106]


@pytest.mark.parametrize("name", ["module.projection_layer.0.weight", "module.text_tower.biolord.encoder.layer.1.output.dense.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(text_state: dict[str, Tensor], tmp_path: Path, name: str, value: float) -> None:
    broken = {n: w.clone() for n, w in text_state.items()}
    broken[name].view(-1)[3] = value
    with pytest.raises(CheckpointError, match="not finite") as caught:
        read_text_encoder(write_published(tmp_path / "broken.pth", broken))
    assert len(caught.value.faults) == 1


def test_file_parts_of_pretraining_are_dropped(text_state: dict[str, Tensor], tmp_path: Path) -> None:
    extra = {"module.atlas_tower.conv.weight": torch.zeros(2), "module.temperature": torch.zeros(1)}
    ids = {"module.text_tower.biolord.embeddings.position_ids": torch.arange(514)[None]}
    path = write_published(tmp_path / "pretrained.pth", {**text_state, **extra, **ids})
    assert read_text_encoder(path).width == WIDTH


def test_partial_or_foreign_text_files_are_refused(text_state: dict[str, Tensor], tmp_path: Path) -> None:
    part = {n: w for n, w in text_state.items() if "layer.1.output.dense.bias" not in n}
    part["module.modality_embed.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"part\.pth.*2 faults") as caught:
        read_text_encoder(write_published(tmp_path / "part.pth", part))
    assert "tower.encoder.layer.1.output.dense.bias" in caught.value.faults[0]
    other = {n.replace("biolord", "medcpt"): w for n, w in text_state.items()}
    with pytest.raises(CheckpointError, match="MedCPT"):
        read_text_encoder(write_published(tmp_path / "medcpt.pth", other))
    with pytest.raises(CheckpointError, match=r"vision\.pth"):
        read_text_encoder(write_published(tmp_path / "vision.pth", {"backbone.encoder.stages.0.0.convs.0.conv.weight": torch.zeros(1)}))


def test_a_text_file_given_as_vision_file_is_distinguished(text_file: Path) -> None:
    with pytest.raises(CheckpointError, match="a text encoder goes to --text"):
        load_segmenter(text_file)


def test_prompts_without_a_word_list_say_what_to_give(text_file: Path) -> None:
    with pytest.raises(InputError, match="--tokenizer"):
        read_text_encoder(text_file).embed(["liver"], "ct")
