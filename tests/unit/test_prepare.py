"""`toolkit data prepare`: files that recipes read, and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from toolkit.cli import main


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def lines_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_labelled_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"<p>漢字 number {row}</p>,{'ab'[row % 2]}" for row in range(40)]
    rows += ["<b>漢字 number 3</b>,b", ",a"]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    name, target = str(tmp_path / "rows.csv"), tmp_path / "out"
    options = ["--data.name", name, "--data.normalise", "html", "simplified", "spaces"]
    assert main(["data", "prepare", "labelled", str(target), *options]) == 0
    splits = {split: lines_of(target / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 28, "validation": 4, "test": 8}
    texts = [row["text"] for found in splits.values() for row in found]
    assert len(set(texts)) == 40
    assert all(str(text).startswith("汉字 number ") for text in texts)
    facts = json.loads((target / "facts.json").read_text(encoding="utf-8"))
    stages = {stage["stage"]: (stage["in"], stage["out"]) for stage in facts["stages"]}
    assert stages["without a text or a label"] == (42, 41)
    assert stages["repeats, and texts under two labels"] == (41, 40)
    shown = capsys.readouterr().out
    assert "汉字 number 3" in shown
    assert f"--data.name {target}/train.jsonl" in shown
    page = (target / "report.html").read_text(encoding="utf-8")
    assert "Some of what was dropped" in page
    assert "<script" not in page
    # What is there is not written over.
    assert main(["data", "prepare", "labelled", str(target), *options]) == 2


def test_rows_of_any_kind(tmp_path: Path) -> None:
    rows = [{"source": f"text {row}", "target": f"文字 {row}", "score": row} for row in range(30)]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, rows[4]]] + ["no JSON"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    target = tmp_path / "out"
    options = ["--format", "parquet", "--data.name", str(tmp_path / "rows.jsonl"), "--data.test_share", "0.2"]
    assert main(["data", "prepare", "rows", str(target), *options]) == 0
    found = [
        row
        for split in ("train", "validation", "test")
        for row in pq.read_table(target / f"{split}.parquet").to_pylist()
    ]
    assert sorted(found, key=lambda row: row["score"]) == rows
    stages = json.loads((target / "facts.json").read_text(encoding="utf-8"))["stages"]
    assert stages[0]["stage"] == "malformed"
    assert "row 32 of" in stages[0]["examples"][0]


def test_a_wrong_key_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "data.yaml"
    config.write_text("data: {nome: x.csv}", encoding="utf-8")
    assert main(["data", "prepare", "texts", str(tmp_path / "out"), "--config", str(config)]) == 2
    assert "data.nome" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
