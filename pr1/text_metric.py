"""How near a text is to the right one: edit distance and the word measures of page OCR.

Runs of white space count as one space and the ends are stripped: where lines break is layout, not reading. Words are
what white space parts; a text with Chinese, Japanese or Korean characters has no spaces and is taken character by character.
Precision, recall and F1 are over the sets of words and BLEU is unsmoothed BLEU-4, as in the page-OCR evaluation of Fox
(arXiv 2405.14295) and GOT (arXiv 2409.01704), which Perception-R1's table 2 follows.
"""

from __future__ import annotations

import re
import warnings

from rapidfuzz.distance import Levenshtein

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
METEOR_WORDS = 2000  # longer pages are cut for METEOR, whose alignment takes quadratic time


def plain(text: str) -> str:
    """The text with runs of white space as one space."""
    return " ".join(text.split())


def edit_distance(found: str, wanted: str) -> float:
    """Levenshtein distance over the longer length, 0..1; two empty texts are 0 apart."""
    return Levenshtein.normalized_distance(found, wanted)


def words(text: str) -> list[str]:
    """The units of the word measures."""
    return [c for c in text if not c.isspace()] if CJK.search(text) else text.split()


def has_wordnet() -> bool:
    """Whether nltk's WordNet data is on this machine; METEOR matches synonyms only with it."""
    from nltk.corpus import wordnet  # here and below: nltk takes a second to import, and only evaluation needs it

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return False
    return True


class _NoSynonyms:
    """In place of WordNet: no word has a synonym."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


def page_metrics(found: str, wanted: str, synonyms: bool) -> dict[str, float]:
    """ed (lower is better), f1, precision, recall, bleu of one page, and `meteor` (nltk's, with WordNet) or, without
    synonyms, `meteor_stem` (exact and Porter-stem matches only); each 0..1."""
    from nltk.corpus import wordnet
    from nltk.translate.bleu_score import sentence_bleu
    from nltk.translate.meteor_score import meteor_score

    found, wanted = plain(found), plain(wanted)
    mine, theirs = words(found), words(wanted)
    both = len(set(mine) & set(theirs))
    precision = both / len(set(mine)) if mine else float(not theirs)
    recall = both / len(set(theirs)) if theirs else float(not mine)
    lexicon = wordnet if synonyms else _NoSynonyms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts too short to hold four words in a row, whose BLEU-4 is 0
        bleu = float(sentence_bleu([theirs], mine)) if mine and theirs else float(mine == theirs)
    cut = theirs[:METEOR_WORDS], mine[:METEOR_WORDS]
    meteor = float(meteor_score([cut[0]], cut[1], wordnet=lexicon)) if mine and theirs else float(mine == theirs)
    return {
        "ed": edit_distance(found, wanted), "f1": 2 * precision * recall / (precision + recall) if both else precision * recall,
        "precision": precision, "recall": recall, "bleu": bleu, "meteor" if synonyms else "meteor_stem": meteor,
    }  # fmt: skip
