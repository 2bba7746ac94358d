"""The Trainer's side of `bert_cls_vs_trainer.py`: a fine-tuning script as one writes it with transformers.

Prints one line of JSON: seconds of each optimizer step, the loss over the last quarter of the steps, peak memory.
Nothing of the toolkit is imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

BEST: dict[str, Any] = {
    "bf16": True,
    "train_sampling_strategy": "group_by_length",
    "optim": "adamw_torch_fused",
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
}


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        """The first step begins."""
        self._last = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """After the optimizer."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def main() -> None:
    """Tokenise, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with weights and a tokenizer")
    parser.add_argument("--data", required=True, help="CSV file with text and label")
    parser.add_argument("--output", required=True, help="folder that the Trainer may write to")
    parser.add_argument("--settings", choices=["best", "defaults"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = load_dataset("csv", data_files=options.data, split="train")
    labels = sorted(set(rows["label"]))
    rows = rows.map(
        lambda row: (
            tokenizer(row["text"], truncation=True, max_length=options.max_length)
            | {"labels": labels.index(row["label"])}
        ),
        remove_columns=["text", "label"],
    )
    rows = rows.map(lambda row: {"length": len(row["input_ids"])})
    clock = Clock()
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels)),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            warmup_steps=options.steps // 10,
            weight_decay=0.01,
            use_cpu=True,
            save_strategy="no",
            logging_steps=max(1, options.steps // 4),
            report_to="none",
            disable_tqdm=True,
            **(BEST if options.settings == "best" else {}),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": clock.seconds, "loss": losses[-1], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
