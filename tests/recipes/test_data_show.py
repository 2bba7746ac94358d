"""`toolkit data show`: samples as the model would see them, before anything is trained or written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest

from tests.chats import ANSWERS, save_chat_model, write_chats
from tests.ranks import on_ranks
from tests.recipes.launching import ROOT
from toolkit.cli import main as toolkit


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "chats.jsonl")
    save_chat_model(folder / "model")
    pairs = [{"prompt": f"{i}: Who sings?", "chosen": "A bird sings.", "rejected": "No."} for i in range(60)]
    texts = [{"text": f"{i} 天空 is the sky", "label": ("sky", "road")[i % 2]} for i in range(60)]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(words: list[str], cwd: str) -> tuple[int, str]:
    """`toolkit WORDS` in this process (a forked one)."""
    os.chdir(cwd)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = toolkit(words)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue()


def show(recipe: str, *words: str, cwd: Path) -> tuple[int, str]:
    found: tuple[int, str] = on_ranks(
        command, 1, ["data", "show", str(ROOT / "recipes" / f"{recipe}.py"), *words], str(cwd)
    )[0]
    return found


def test_of_conversations_the_answers_are_learnt(there: Path, tmp_path: Path) -> None:
    options = ["--model.name", str(there / "model"), "--data.name", str(there / "chats.jsonl"), "--samples", "4"]
    code, text = show("sft", *options, cwd=tmp_path)
    assert code == 0, text
    assert len(re.findall(r"^\d · tokens: ", text, re.MULTILINE)) == 4
    learnt = re.findall(r"⟦([^⟦⟧]*)⟧", text)[1:]  # the first is the legend
    assert len(learnt) >= 4
    assert {part.replace("\n", "") for part in learnt} <= {f"{answer}<|im_end|>" for answer in ANSWERS.values()}
    outside = re.sub(r"⟦[^⟦⟧]*⟧", "", text)
    assert "<|im_start|>user" in outside
    assert not any(answer in outside for answer in ANSWERS.values())
    assert "▒×" in text
    assert not list(tmp_path.iterdir()), "no run has begun"


def test_of_pairs_both_answers(there: Path, tmp_path: Path) -> None:
    options = ["--model.name", str(there / "model"), "--data.name", str(there / "pairs.jsonl"), "--samples", "1"]
    code, text = show("dpo", *options, cwd=tmp_path)
    assert code == 0, text
    assert re.findall(r"\d · (the \w+ answer)", text) == ["the preferred answer", "the other answer"]
    assert re.findall(r"⟦([^⟦⟧]*)⟧", text)[1:] == ["A bird sings.<|im_end|>", "No.<|im_end|>"]


def test_of_classes_the_label(there: Path, tmp_path: Path) -> None:
    code, text = show("bert_cls", "--data.name", str(there / "texts.jsonl"), cwd=tmp_path)
    assert code == 0, text
    labels = re.findall(r"label: (\w+)", text)
    numbers = [int(number) for number in re.findall(r"^\[CLS\] (\d+)", text, re.MULTILINE)]
    assert labels == [("sky", "road")[number % 2] for number in numbers]
    assert len(labels) == 3
    assert "⟦" not in text


def test_of_texts_all_but_the_first_token(there: Path, tmp_path: Path) -> None:
    sizes = ["--model.layers", "2", "--model.hidden_size", "32", "--model.heads", "4", "--tokenizer.vocabulary", "300"]
    code, text = show("pretrain_lm", *sizes, "--data.name", str(there / "texts.jsonl"), "--samples", "1", cwd=tmp_path)
    assert code == 0, text
    assert "the sky" in text
    assert re.search(r"tokens: [\d,]+ learnt, 1 given", text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "show", "recipes/none.py"], "there is no recipe recipes/none.py"),
        (["data", "show", "RECIPE", "--samples", "0"], "--samples 0 shows nothing"),
        (["data", "show", "RECIPE", "--data.nme", "x"], "--data.nme"),
        (["data", "shw"], "there is no command 'shw'"),
    ],
)
def test_mistakes(words: list[str], said: str, tmp_path: Path) -> None:
    words = [str(ROOT / "recipes" / "sft.py") if word == "RECIPE" else word for word in words]
    code, text = on_ranks(command, 1, words, str(tmp_path))[0]
    assert code == 2, text
    assert said in " ".join(text.replace("│", " ").split())
    assert "Traceback" not in text
