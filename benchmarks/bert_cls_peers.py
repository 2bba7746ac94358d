"""The other side of `bert_cls_vs_trainer.py`: fine-tuning as one writes it without the toolkit.

`trainer-best` and `trainer-defaults` use the Trainer of transformers; `accelerate` is a loop as in accelerate's
examples; `loop` is the shortest one, on tensors that were padded before the clock starts. All clip gradients to 1.
Prints one line of JSON: seconds of each optimizer step, the time of day when the first began, the loss over the last
quarter of the steps, peak memory.
Nothing of the toolkit is imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from benchmarks.device import device, peak_bytes
from benchmarks.trainer_side import Clock

BEST: dict[str, Any] = {
    "bf16": True,
    "train_sampling_strategy": "group_by_length",
    "optim": "adamw_torch_fused",
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
}


def main() -> None:
    """Tokenise, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["trainer-best", "trainer-defaults", "accelerate", "loop"])
    parser.add_argument("--model", required=True, help="folder with weights and a tokenizer")
    parser.add_argument("--data", required=True, help="CSV file with text and label")
    parser.add_argument("--output", required=True, help="folder that the Trainer may write to")
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
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))
    clock = Clock()
    if options.peer.startswith("trainer"):
        loss = with_trainer(model, rows, tokenizer, clock, options)
    else:
        loss = with_loop(model, rows.remove_columns("length"), tokenizer, clock, options)
    print(json.dumps({"seconds": clock.seconds, "began": clock.began, "loss": loss, "peak_bytes": peak_bytes()}))


def with_trainer(model: Any, rows: Any, tokenizer: Any, clock: Clock, options: argparse.Namespace) -> float:
    """The Trainer; the mean loss over the last quarter of the steps."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            warmup_steps=options.steps // 10,
            weight_decay=0.01,
            use_cpu=device().type == "cpu",
            save_strategy="no",
            logging_steps=max(1, options.steps // 4),
            report_to="none",
            disable_tqdm=True,
            **(BEST if options.peer == "trainer-best" else {}),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def with_loop(model: Any, rows: Any, tokenizer: Any, clock: Clock, options: argparse.Namespace) -> float:
    """A loop in bf16, accelerate's or the shortest; the mean loss over the last quarter of the steps."""
    loader: Any = DataLoader(
        rows, batch_size=options.batch, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, fused=True)
    schedule: Any = get_linear_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    model.train()
    if options.peer == "accelerate":
        accelerator = Accelerator(cpu=device().type == "cpu", mixed_precision="bf16")
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        batches, backward = endless(loader, options.steps), accelerator.backward
    else:
        model.to(device())
        batches = iter([batch.to(device()) for batch in endless(loader, options.steps)])
        backward = torch.Tensor.backward
    losses = []
    clock.on_train_begin()
    for batch in batches:
        with torch.autocast(device().type, torch.bfloat16, enabled=options.peer == "loop"):
            loss = model(**batch).loss
        backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.on_step_end()
    return statistics.fmean(losses[-max(1, options.steps // 4) :])


def endless(loader: Any, steps: int) -> Iterator[Any]:
    """So many batches, epoch after epoch."""
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            done += 1
            yield batch


if __name__ == "__main__":
    main()
