"""What the peers share that use transformers' Trainer. Nothing of the toolkit is imported."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from benchmarks.device import device, peak_bytes


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, and the time of day when the first begins."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0
        self._last = 0.0

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        """The first step begins."""
        self._last, self.began = time.perf_counter(), time.time()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """After the optimizer."""
        # A GPU is not waited for, or the Trainer could not run ahead of it; over many steps it comes to the same.
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `rows` and `language_model_options` read."""
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--output", required=True, help="folder that the Trainer may write to")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="sequences of one forward pass")
    parser.add_argument("--accumulate", type=int, required=True, help="forward passes of a step")
    parser.add_argument("--lr", type=float, required=True)


def rows(options: argparse.Namespace, name: str) -> Dataset:
    """Those of a file of `--data`."""
    file, cache = Path(options.data) / f"{name}.jsonl", Path(options.output) / "cache"
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))


def language_model_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the Trainer for a language model: bf16, fused AdamW, a process that loads, nothing saved."""
    return {
        "output_dir": options.output,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.lr,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "warmup_steps": options.steps // 10,
        "max_grad_norm": 1.0,
        "bf16": True,
        "optim": "adamw_torch_fused",
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "use_cpu": device().type == "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


@torch.no_grad()
def held_out(model: Any, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[str, float]:
    """Loss of a token in bf16, and the number of tokens, of held-out texts taken one by one.

    Args:
        model: on its device.
        rows: tokens of a text, and the same with -100 where nothing is predicted.
    """
    model.eval()
    total, tokens = 0.0, 0
    for ids, labels in rows:
        inputs, wanted = (torch.tensor([values], device=model.device) for values in (ids, labels))
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(input_ids=inputs).logits
        total += float(cross_entropy(logits[0, :-1].float(), wanted[0, 1:], reduction="sum"))
        tokens += int((wanted[0, 1:] != -100).sum())
    model.train()
    return {"loss": total / tokens, "units": tokens}


def tell(clock: Clock, peak: int, **figures: Any) -> None:
    """Print one line of JSON: seconds of each step, peak memory, and other figures."""
    print(json.dumps({"seconds": clock.seconds, "peak_bytes": peak, **figures}))


def logged(trainer: Any, figure: str) -> list[float]:
    """A figure of each step."""
    return [float(entry[figure]) for entry in trainer.state.log_history if "loss" in entry]


def train(trainer: Any) -> int:
    """Train; the most memory that the process has held by then."""
    trainer.train()
    return peak_bytes()
