"""Figures of written texts: those of the libraries' own command lines, Chinese by characters, the lead sentence."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from toolkit.text_scores import bleu_and_chrf, bleu_tokenizer, lead, rouge

ENGLISH = (
    ["the cat sat on the mat .", "A dog barked, loudly!", "It's raining (again) in 2004."],
    ["The cat sat on a mat.", "The dog barked loudly.", "It is raining again, in 2004."],
)
CHINESE = (
    ["无法连接到设备。", "打开灯 RGB", "温度过高，请检查"],
    ["无法连接设备。", "打开灯光 RGB", "温度太高，请检查。"],
)


@pytest.mark.parametrize(("texts", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")], ids=["english", "chinese"])
def test_bleu_and_chrf_are_those_of_sacrebleus_command_line(
    texts: tuple[list[str], list[str]], tokenizer: str, tmp_path: Path
) -> None:
    written, wanted = texts
    for name, lines in (("written", written), ("wanted", wanted)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "wanted", "-i", "written", "-m", "bleu", "chrf", "-b", "-w", "6"]
    shown = subprocess.run(
        [*command, "--tokenize", tokenizer], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    bleu, chrf = (
        float(number) for number in shown.stdout.replace("[", " ").replace("]", " ").replace(",", " ").split()
    )
    found = bleu_and_chrf(written, wanted)
    assert found["bleu"] == pytest.approx(bleu, abs=1e-6)
    assert found["chrf"] == pytest.approx(chrf, abs=1e-6)
    assert f"tok:{tokenizer}" in found["bleu_signature"]
    assert bleu_and_chrf(wanted, wanted)["bleu"] == pytest.approx(100)


def test_the_tokenizer_follows_the_language() -> None:
    assert bleu_tokenizer(ENGLISH[1]) == "13a"
    assert bleu_tokenizer(CHINESE[1]) == "zh"
    assert bleu_tokenizer(["{name} 已更新到 {version}", "Wi-Fi 信号"]) == "zh"
    assert bleu_tokenizer([""]) == "13a"


def test_rouge_is_that_of_rouge_scores_command_line(tmp_path: Path) -> None:
    written, wanted = ENGLISH
    (tmp_path / "written.txt").write_text("\n".join(written) + "\n")
    (tmp_path / "wanted.txt").write_text("\n".join(wanted) + "\n")
    options = ["--prediction_filepattern=written.txt", "--target_filepattern=wanted.txt", "--output_filename=out.csv"]
    subprocess.run([sys.executable, "-m", "rouge_score.rouge", *options], cwd=tmp_path, capture_output=True, check=True)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    theirs = {row["score_type"]: float(row["mid"]) for row in rows if row["score_type"].endswith("-F")}
    exact = {
        name: sum(RougeScorer([name]).score(b, a)[name].fmeasure for a, b in zip(written, wanted, strict=True)) / 3
        for name in ("rouge1", "rouge2", "rougeL")
    }
    found = rouge(written, wanted)
    assert found == pytest.approx(exact)
    for name in found:  # whose command line draws samples of the texts to tell how sure it is
        assert found[name] == pytest.approx(theirs[f"{name}-F"], abs=0.02)


def test_rouge_reads_chinese_by_characters() -> None:
    assert rouge(["温度过高"], ["温度太高"]) == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4})
    assert rouge(["用 RGB 灯"], ["RGB灯"])["rouge1"] == pytest.approx(2 * 2 / (3 + 2))
    assert rouge([""], ["温度"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_the_lead_is_the_first_sentence() -> None:
    assert lead("Shares fell. They rose.\n\nLater.") == "Shares fell."
    assert lead('\n"It is over!" he said. "Go."\nNext') == '"It is over!" he said.'
    assert lead('"Go." They went.') == '"Go."'
    assert lead("Profits rose 2.5% in May. Then") == "Profits rose 2.5% in May."
    assert lead("股市下跌。随后上涨。") == "股市下跌。"
    assert lead("no end") == "no end"
    assert lead("") == ""
