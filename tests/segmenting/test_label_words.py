"""Names that are asked of a pack: its own labels in any spelling or language, and suggestions that it can answer."""

from __future__ import annotations

import re

import pytest

from medlore.errors import InputError
from medlore.segmenting.labels import ModelFacts, facts_of_pack, route_labels


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    found = facts_of_pack("medlore:seg-mini")
    assert found is not None
    return found


def test_own_labels_are_found_in_other_spellings_and_languages(facts: ModelFacts) -> None:
    routes = route_labels(facts, ["Hippocampi", "Gehirn", "caudate nuclei", "left thalami", "cervelet", "gray_matter"], "t1")
    assert routes.labels == ("hippocampus", "brain", "caudate nucleus", "left thalamus", "cerebellum", "grey matter")
    assert set(routes.by_region) == {"brain"}  # `brain` is the pack's own label, not the vocabulary's of the head and neck


def test_suggestions_are_labels_of_the_pack(facts: ModelFacts) -> None:
    assert facts.prompts is not None
    with pytest.raises(InputError) as caught:
        route_labels(facts, ["hipocamus", "eye bal"], "mri")
    named = re.findall("'([^']+)'", " ".join(caught.value.faults))
    assert {"hipocamus", "eye bal"} < set(named)
    assert all(f"mri/{name}" in facts.prompts for name in named if name not in {"hipocamus", "eye bal"})
    assert "hippocampus" in named
