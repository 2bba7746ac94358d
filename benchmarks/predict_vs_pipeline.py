"""Answers on texts of ragged lengths: `toolkit predict`'s classifier against what a user would take instead.

    python benchmarks/predict_vs_pipeline.py
    python benchmarks/predict_vs_pipeline.py --peer trainer

All classify the same texts with the same MiniLM (22.7 M parameters) in fp32, 32 texts to a forward pass, in this one
process and in turns: the toolkit's `Classifier.predict`, the `text-classification` pipeline of transformers, and
`Trainer.predict`, which gets its texts tokenised. The texts are news articles cut by whole words to lognormal lengths
(mean 61 tokens, at most 256) in random order. The answers must be the same. The samples of model and texts must have
been fetched once.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
import transformers
from datasets import Dataset

from benchmarks.bert_cls_vs_trainer import write_texts
from benchmarks.side_by_side import Figures, add_options, in_turns, machine, show, summary, write
from toolkit import samples
from toolkit.predict import find_model
from toolkit.predict.classifier import Classifier

BATCH, LONGEST, GOAL = 32, 256, 2.0
APART = 1e-4
"""Largest difference of a probability."""


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["pipeline", "trainer"], default="pipeline")
    parser.add_argument("--rows", type=int, default=640, help="texts (default: 640)")
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="predict_vs_pipeline_") as name:
        folder = Path(name)
        write_texts(folder, "lognormal", options.rows)
        with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
        answers = {"ours": ours(save_model(folder)), "peer": PEERS[options.peer](folder / "model")}
        for answer in answers.values():
            answer(texts[:BATCH])  # to warm up
        found: dict[str, torch.Tensor] = {}
        sides = {side: lambda _, side=side: timed(answers[side], texts, found, side) for side in answers}
        runs = in_turns(sides, options.rounds, "texts_per_second")
    apart = float((found["ours"] - found["peer"]).abs().max())
    result = {"benchmark": "predict_vs_pipeline", "against": options.peer}
    result |= summary(runs, "texts_per_second", GOAL)
    result |= {"texts": options.rows, "largest_difference": apart, "same_answers": apart <= APART, **machine()}
    names = {"ours": "toolkit predict", "peer": options.peer}
    show(result, names)
    print(f"largest difference of a probability: {apart:.1e}")
    write(result, options, names, "answers on ragged texts")
    raise SystemExit(0 if result["same_answers"] else "the answers differ")


def timed(answer: Callable[[list[str]], torch.Tensor], texts: list[str], found: Any, side: str) -> Figures:
    """Texts a second; the probabilities are kept to be compared."""
    began = time.perf_counter()
    found[side] = answer(texts)
    return {"texts_per_second": len(texts) / (time.perf_counter() - began)}


def save_model(folder: Path) -> Path:
    """MiniLM with a head that has learnt nothing, as a saved model."""
    torch.manual_seed(0)
    body = str(samples.fetch("minilm"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(body, num_labels=5)
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(folder / "model")
    return folder / "model"


def ours(model: Path) -> Callable[[list[str]], torch.Tensor]:
    """What `toolkit predict` asks."""
    classifier = Classifier(find_model(model), device="cpu", max_length=LONGEST)

    def answer(texts: list[str]) -> torch.Tensor:
        found = classifier.predict(texts, batch=BATCH)
        return torch.tensor([[row.scores[label] for label in classifier.labels] for row in found])

    return answer


def pipeline(model: Path) -> Callable[[list[str]], torch.Tensor]:
    """The pipeline, with all classes."""
    pipe = transformers.pipeline("text-classification", model=str(model), device="cpu")

    def answer(texts: list[str]) -> torch.Tensor:
        options = {"batch_size": BATCH, "top_k": None, "truncation": True, "max_length": LONGEST}
        found = pipe(texts, **options)
        return torch.tensor([[score["score"] for score in sorted(row, key=lambda s: s["label"])] for row in found])

    return answer


def trainer(model: Path) -> Callable[[list[str]], torch.Tensor]:
    """`Trainer.predict`, with tokenisation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(model / "out"),
        per_device_eval_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    peer = transformers.Trainer(network, arguments, processing_class=tokenizer)

    def answer(texts: list[str]) -> torch.Tensor:
        rows = Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=LONGEST)))
        return torch.tensor(peer.predict(rows).predictions).softmax(-1)

    return answer


PEERS = {"pipeline": pipeline, "trainer": trainer}

if __name__ == "__main__":
    main()
