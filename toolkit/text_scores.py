"""Figures of written texts against those that were wanted: BLEU and chrF of translations, ROUGE of summaries.

BLEU and chrF are sacrebleu's (Post 2018), ROUGE is rouge-score's, with a tokenizer that reads Chinese too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from toolkit.requirements import optional

EXTRA = "translate"
"""Of this project, which installs both libraries."""
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_WORDS = re.compile("[a-z0-9]+|[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_SENTENCE = re.compile(r"""\S.*?(?:[.!?]["'”’)]*(?=\s+[^a-z\s])|[。！？][”’」』]*)""")
_MANY = 0.2
"""Share of Chinese characters from which texts are taken for Chinese ones, with names in Latin letters among them."""


def bleu_and_chrf(written: Sequence[str], wanted: Sequence[str], tokenizer: str = "auto") -> dict[str, Any]:
    """BLEU and chrF of a corpus, as percentages, and the signature by which sacrebleu tells how BLEU was computed.

    Args:
        written: texts of a model.
        wanted: a reference for each.
        tokenizer: of sacrebleu (`13a`, `zh`, `char`, `intl`, …); `auto` takes `zh` where the references are Chinese,
            else `13a`.
    """
    sacrebleu = optional("sacrebleu", "BLEU", EXTRA)
    bleu = sacrebleu.metrics.BLEU(tokenize=bleu_tokenizer(wanted) if tokenizer == "auto" else tokenizer)
    score = bleu.corpus_score(list(written), [list(wanted)])
    chrf = sacrebleu.metrics.CHRF().corpus_score(list(written), [list(wanted)])
    return {"bleu": float(score.score), "chrf": float(chrf.score), "bleu_signature": str(bleu.get_signature())}


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for texts of this language: Chinese has no spaces between its words."""
    characters = "".join(texts)
    return "zh" if len(_CHINESE.findall(characters)) > _MANY * len(characters) else "13a"


def rouge(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L: F1 of common words, pairs of them and the longest common subsequence, in the mean.

    Words are runs of Latin letters and digits in lower case (as rouge-score has them, without stemming), and each
    Chinese character is one.

    Args:
        written: texts of a model.
        wanted: a reference for each.
    """
    scorer = optional("rouge_score.rouge_scorer", "ROUGE", EXTRA).RougeScorer(
        ["rouge1", "rouge2", "rougeL"], tokenizer=_Words()
    )
    found = [scorer.score(target, text) for text, target in zip(written, wanted, strict=True)]
    return {name: sum(one[name].fmeasure for one in found) / len(found) for name in ("rouge1", "rouge2", "rougeL")}


def lead(text: str) -> str:
    """The first sentence of a text: what a summary has to be better than."""
    line = next(filter(None, map(str.strip, text.splitlines())), "")
    found = _SENTENCE.match(line)
    return found[0] if found else line


class _Words:
    def tokenize(self, text: str) -> list[str]:
        """Its words."""
        return _WORDS.findall(text.lower())
