from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from medlore.assets import asset_path
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.models.segmenter.spellings import folded
from medlore.models.segmenter.vocabulary import REGIONS, WHOLE_BODY, Vocabulary, canonical_modality, default_vocabulary

WORDS = default_vocabulary()


def test_the_published_pairs_are_all_there() -> None:
    """Counts of the published list: 248 CT and 181 MR labels, 384 names, and its regions with the one stated override."""
    published = [e for e in WORDS.entries() if e.published]
    assert Counter(e.modality for e in published) == {"ct": 248, "mri": 181}
    assert len({e.label for e in published}) == 384
    regions = {"brain": 131, "thorax": 79, "spine": 54, "abdomen": 49, "pelvis": 23, "lower limb": 10, "whole body": 1}
    # the merged scapula moves from head and neck (74) to its two sides in the upper limb (8)
    assert Counter(e.region for e in published) == {**regions, "head and neck": 73, "upper limb": 9}


def test_every_totalsegmentator_class_is_found(shared_data: Path) -> None:
    for name, modality in (("class_map_total", "ct"), ("class_map_total_mr", "mri")):
        classes = json.loads((shared_data / f"totalseg/{name}.json").read_text()).values()
        entries = WORDS.lookup_all(list(classes), modality)
        assert len(entries) == len(classes)
        assert not [e for e in entries if e.region not in (*REGIONS, WHOLE_BODY)]


@pytest.mark.parametrize(
    ("asked", "modality", "label", "region"),
    [
        ("liver", "ct", "liver", "abdomen"),
        ("Kidney_Left", "CT", "left kidney", "abdomen"),
        ("  left   kidney ", "t1", "left kidney", "abdomen"),
        ("rib_right_4", "ct", "right rib 4", "thorax"),
        ("vertebrae_L3", "ct", "lumbar vertebrae 3 (l3)", "spine"),
        ("l6", "ct", "lumbar vertebrae 6 (l6)", "spine"),
        ("WMH", "flair", "white matter hyperintensities", "brain"),
        ("gray matter", "mri", "grey matter", "brain"),
        ("oesophagus", "ct", "esophagus", "head and neck"),
        ("oesophagus", "mr", "esophagus", "thorax"),
        ("scapula", "ct", "scapula", "upper limb"),
        ("femur cartilage", "mri", "femur cartilage", "lower limb"),
        ("bone", "ct", "bone", "whole body"),
        ("disc l4-l5", "t2", "intervertebral disc between lumbar vertebrae 4 (l4) and lumbar vertebrae 5 (l5)", "spine"),
    ],
)
def test_labels_find_their_region(asked: str, modality: str, label: str, region: str) -> None:
    entry = WORDS.lookup(asked, modality)
    assert (entry.label, entry.region) == (label, region)


def test_no_synonym_stands_for_two_labels() -> None:
    spellings = Counter(s for label in {e.label: e for e in WORDS.entries()}.values() for s in label.synonyms)
    assert [s for s, count in spellings.items() if count > 1] == []
    labels = {e.label for e in WORDS.entries()}
    assert sorted(labels & set(spellings)) == []


def test_labels_are_spelt_as_the_text_encoder_gets_them() -> None:
    assert [e.label for e in WORDS.entries() if e.label != e.label.lower().strip()] == []


def test_unknown_labels_name_the_nearest_three() -> None:
    with pytest.raises(UnknownNameError, match=r"276 labels of ct; the nearest are 'liver', '[a-z ]+', '[a-z ]+'") as caught:
        WORDS.lookup("livr", "ct")
    assert "--allow-unknown" in caught.value.fix


def test_the_nearest_can_all_be_asked_for_in_this_modality() -> None:
    ct = {e.label for e in WORDS.entries(modality="ct")}
    for asked in ("gray mater", "putamin", "left insulla"):
        with pytest.raises(UnknownNameError) as caught:
            WORDS.lookup(asked, "ct")
        named = re.findall("'([^']+)'", caught.value.accepted)
        assert len(named) == 3
        assert set(named) <= ct


def test_a_near_synonym_leads_to_its_label() -> None:
    with pytest.raises(UnknownNameError, match="'inferior vena cava'"):
        WORDS.lookup("postkava", "ct")


def test_wrong_modality_is_refused_and_says_which_would_be_right() -> None:
    with pytest.raises(UnknownNameError, match="'white matter' is known in mri only, not in ct"):
        WORDS.lookup("white matter", "ct")
    forced = WORDS.lookup("white matter", "ct", allow_unknown=True)
    assert (forced.region, forced.known) == ("brain", False)
    assert WORDS.lookup("left earring", "ct", allow_unknown=True).region == WHOLE_BODY


def test_routing_keeps_order_and_drops_repetitions() -> None:
    routes = WORDS.route(["spleen", "heart", "Liver", "liver", "kidney_left"], "ct")
    assert routes == {"abdomen": ["spleen", "liver", "left kidney"], "thorax": ["heart"]}


def test_all_unknown_labels_of_a_case_are_reported_at_once() -> None:
    with pytest.raises(InputError, match="2 of 3 unknown in mri") as caught:
        WORDS.route(["liver", "gall blader", "lung nodule"], "mri")
    assert "gallbladder" in caught.value.faults[0]
    assert "known in ct only" in caught.value.faults[1]


@pytest.mark.parametrize(
    ("dataset", "region"),
    [
        ("SKI10", "lower limb"),
        ("AMOS22_CT_abdomen", "abdomen"),
        ("WORD_lower limb", "lower limb"),
        ("TotalSegmentator_v2_head and neck", "head and neck"),
    ],
)
def test_data_sets_choose_as_lorkd_does(dataset: str, region: str) -> None:
    assert WORDS.region_of_dataset(dataset) == region


def test_data_sets_of_several_regions_need_a_suffix() -> None:
    assert len(WORDS.datasets) == 34
    with pytest.raises(UnknownNameError, match="AMOS22_CT"):
        WORDS.region_of_dataset("AMOS22_CT")


@pytest.mark.parametrize(
    ("word", "modality"), [("T1ce", "mri"), ("t2_flair", "mri"), ("MR", "mri"), ("PT", "pet"), ("CTA", "ct"), ("ultrasound", "us")]
)
def test_modalities_have_many_names(word: str, modality: str) -> None:
    assert canonical_modality(word) == modality


@pytest.mark.parametrize("word", ["pet/ct", "xray", ""])
def test_other_modalities_are_refused(word: str) -> None:
    with pytest.raises(UnknownNameError, match="modality"):
        canonical_modality(word)


def test_listing_by_modality_and_region() -> None:
    chosen = WORDS.entries(modality="mr", region="Lower_limb")
    assert {e.region for e in chosen} == {"lower limb"}
    assert [e.label for e in chosen if e.published] == ["femur bone", "femur cartilage", "tibia bone", "tibia cartilage"]
    with pytest.raises(UnknownNameError, match="'thorax'"):
        WORDS.entries(region="torax")


def test_ribs_are_listed_in_their_order() -> None:
    ribs = [e.label for e in WORDS.entries(modality="ct", region="thorax") if e.label.startswith("left rib ")]
    assert ribs == [f"left rib {i}" for i in range(1, 13)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"labels": {}}, "schema"),
        ({"schema": "medlore/vocabulary/1", "labels": {"x": {}}}, "x: no regions"),
        (
            {"schema": "medlore/vocabulary/1", "labels": {"x": {"regions": {"ct": "torso"}}}, "datasets": {"d": "torso"}},
            "unknown region 'torso'",
        ),
    ],
)
def test_faulty_vocabulary_files_are_refused(content: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        Vocabulary.read(tmp_path / "words.json")


# -- other spellings and languages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "modality", "label"),
    [
        ("hippocampi", "mri", "hippocampus"),
        ("Kidneys", "ct", "kidney"),
        ("pancreas tumours", "ct", "pancreas tumor"),
        ("Oesophagus", "ct", "esophagus"),
        ("vertebra", "ct", "vertebrae"),
        ("iliac arteries", "ct", "iliac artery"),
        ("left humeri", "ct", "left humerus"),
        ("lenses", "ct", "lens"),
        ("linke Niere", "ct", "left kidney"),
        ("Niere rechts", "ct", "right kidney"),
        ("rein gauche", "ct", "left kidney"),
        ("riñón_derecho", "ct", "right kidney"),
        ("RINON DERECHO", "ct", "right kidney"),
        ("pulmão esquerdo", "ct", "left lung"),
        ("cœur", "ct", "heart"),
        ("Schaedel", "ct", "skull"),
        ("vesica urinaria", "ct", "urinary bladder"),
    ],
)
def test_plurals_spellings_and_languages_are_understood(asked: str, modality: str, label: str) -> None:
    assert WORDS.lookup(asked, modality).label == label


def test_the_form_for_comparison_keeps_all_labels_and_synonyms_apart() -> None:
    entries = {e.label: e for e in WORDS.entries()}
    forms: dict[str, set[str]] = {}
    for label, entry in entries.items():
        for name in (label, *entry.synonyms):
            forms.setdefault(folded(name), set()).add(label)
    assert [labels for labels in forms.values() if len(labels) > 1] == []


def test_forty_structures_have_names_in_five_languages_and_each_name_leads_back() -> None:
    raw = json.loads(asset_path("vocabulary.json").read_text(encoding="utf-8"))["translations"]
    assert len(raw) == 40
    for label, names in raw.items():
        assert set(names) == {"de", "fr", "es", "it", "pt", "la"}
        assert {WORDS.label_of(name) for known in names.values() for name in known} == {label}


def test_what_could_mean_two_labels_means_none() -> None:
    where = {"regions": {"ct": "abdomen"}}
    words = Vocabulary({"lobe": where, "node": where}, translations={"lobe": {"xx": ["dies"]}, "node": {"xx": ["dies"]}})
    assert words.label_of("lobes") == "lobe"
    assert words.label_of("dies") is None


def test_the_nearest_are_those_that_can_be_answered() -> None:
    with pytest.raises(UnknownNameError, match="3 labels of ct") as caught:
        WORDS.lookup("spleeen", "ct", among={"heart", "spleen", "liver"})
    assert set(re.findall("'([^']+)'", caught.value.accepted)) == {"heart", "spleen", "liver"}
    assert "names are English" in caught.value.fix


def test_thousands_of_unknown_names_are_counted_and_the_nearest_of_the_first_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from medlore.models.segmenter import vocabulary

    asked: list[str] = []
    plain = vocabulary.nearest_names
    monkeypatch.setattr(vocabulary, "nearest_names", lambda name, *rest: asked.append(name) or plain(name, *rest))
    with pytest.raises(InputError, match="5000 of 5000 unknown in ct") as caught:
        default_vocabulary().lookup_all([f"structure number {i}" for i in range(5000)], "ct")
    assert len(caught.value.faults) == 5000
    assert len(asked) == InputError.shown_faults  # each search costs as much as reading all names
