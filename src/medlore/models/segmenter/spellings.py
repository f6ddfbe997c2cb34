"""One form for the ways in which a structure is written: sides, plurals, British and Latin spellings, accents.

The form is a key for comparison, not a word: both sides of a comparison are brought into it, so it only has to keep apart what is
different (a test compares all labels of the vocabulary).
"""

from __future__ import annotations

import re
import unicodedata

_LETTERS = {"œ": "oe", "æ": "ae", "ß": "ss", "ø": "o", "ł": "l", "ä": "ae", "ö": "oe", "ü": "ue"}
_LEFT = "left l links linke linker linkes gauche izquierdo izquierda sinistro sinistra esquerdo esquerda sinister"
_RIGHT = "right r rechts rechte rechter rechtes droit droite derecho derecha destro destra direito direita dexter"
_BRITISH = {"grey": "gray", "centre": "center", "fibre": "fiber"}
_SHORTEST = 4  # letters; shorter words (l5, pons) have no ending that is looked at


def side_of(text: str) -> tuple[str | None, str]:
    """Left or right, in any of six languages, and the words without it.

    Examples:
        >>> side_of("kidney, left"), side_of("linke Niere"), side_of("liver")
        (('left', 'kidney'), ('left', 'Niere'), (None, 'liver'))
    """
    words = re.split(r"[\s_,]+", text.strip())
    for side, known in (("left", _LEFT.split()), ("right", _RIGHT.split())):
        at = next((i for i, word in enumerate(words) if word.casefold() in known), None)
        if at is not None and len(words) > 1:
            return side, " ".join(words[:at] + words[at + 1 :])
    return None, " ".join(words)


def folded(text: str) -> str:
    """The form of a name for comparison.

    Examples:
        >>> folded("Oesophagus") == folded("esophagus"), folded("left hippocampi") == folded("Hippocampus_left")
        (True, True)
        >>> folded("kidney tumours") == folded("kidney tumor"), folded("vertebra") == folded("vertebrae")
        (True, True)
    """
    side, rest = side_of(text)
    words = [_folded_word(word) for word in re.split(r"[\s_'’-]+", rest) if word]
    return " ".join(words if side is None else [side, *words])


def _folded_word(word: str) -> str:
    plain = "".join(_LETTERS.get(letter, letter) for letter in unicodedata.normalize("NFC", word.casefold()))
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(letter))
    plain = _one_of(plain) if len(plain) > _SHORTEST - 1 and plain.isalpha() else plain
    plain = re.sub(r"our$", "or", plain)
    return _BRITISH.get(plain, plain).replace("ae", "e").replace("oe", "e")


def _one_of(word: str) -> str:
    """The singular of an English or Latin plural, or what a singular that ends alike becomes."""
    for pattern, ending in (("ies$", "y"), ("ii$", "ius"), ("i$", "us"), ("(?<=[sxz])es$", ""), ("(?<=[cs]h)es$", ""), ("ae$", "a")):
        word, count = re.subn(pattern, ending, word)
        if count:
            break
    if word.endswith("s") and not word.endswith(("us", "ss", "is")):
        word = word[:-1]
    return word[:-1] + "um" if word.endswith("a") and len(word) > _SHORTEST else word
