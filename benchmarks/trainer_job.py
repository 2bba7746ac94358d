"""The Trainer's side of `resume_vs_trainer.py`: a fine-tuning script as one writes it with transformers, plus a record.

It starts, or goes on where its output folder holds a checkpoint, as the example scripts of transformers do. What a
rank consumes is appended to a file of its own, in the format of the toolkit's ledger, with loss and learning rate.
Nothing of the toolkit is imported.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_from_disk
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

RECORD = "RESUME_BENCHMARK_RECORD"
"""Names the folder of this start's record. Not an option: the command is to be the same each time."""


class Recorded(Trainer):
    """The Trainer, which also keeps what it is given until the step is done; it computes nothing else."""

    consumed: list[dict[str, Any]]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """The Trainer's own loss; ids, plain cross-entropy and learning rate are noted beside it."""
        ids = inputs.pop("id").tolist()
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        with torch.no_grad():
            total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum").item()
        self.consumed.append({"ids": ids, "loss": total, "lr": self.optimizer.param_groups[0]["lr"]})
        return (loss, outputs) if return_outputs else loss


class Record(TrainerCallback):
    """Appends each step that is done to this rank's file."""

    def __init__(self, trainer: Recorded) -> None:
        self.trainer = trainer
        trainer.consumed = []

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """After the optimizer's step, and before a save."""
        steps_per_epoch = state.max_steps // args.num_train_epochs
        # The epoch as the Trainer itself counts it when it resumes.
        place = {"step": state.global_step, "epoch": int((state.global_step - 1) // steps_per_epoch)}
        path = Path(os.environ[RECORD]) / f"rank_{args.process_index:05d}.jsonl"
        with path.open("ab", buffering=0) as file:
            file.write(b"".join(json.dumps(place | part).encode() + b"\n" for part in self.trainer.consumed))
        self.trainer.consumed = []


def main() -> None:
    """Train, or train on, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with weights and a tokenizer")
    parser.add_argument("--rows", required=True, help="data set on disk with input_ids, labels and id")
    parser.add_argument("--output", required=True, help="folder for checkpoints and the model")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples of one process in one step")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--weight-decay", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--save-steps", type=int, required=True)
    options = parser.parse_args()

    trainer = Recorded(
        model=AutoModelForSequenceClassification.from_pretrained(options.model),
        args=TrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            weight_decay=options.weight_decay,
            seed=options.seed,
            save_steps=options.save_steps,
            use_cpu=True,
            remove_unused_columns=False,  # or `id` would not reach compute_loss
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_from_disk(options.rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.add_callback(Record(trainer))
    started = Path(options.output).is_dir() and get_last_checkpoint(options.output) is not None
    trainer.train(resume_from_checkpoint=started)
    trainer.save_model(str(Path(options.output) / "model"))


if __name__ == "__main__":
    main()
