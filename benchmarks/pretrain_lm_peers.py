"""The other side of `pretrain_lm_vs_trainer.py`: pre-training as transformers' own example `run_clm.py` does it.

Texts are tokenised, joined with the end token between them and cut into blocks of the same length, whatever text a
block's tokens belong to; a new network of the same configuration learns them under the Trainer at its best: bf16, fused
AdamW, a process that loads. `trainer-compiled` lets torch compile the network as well.
Prints one line of JSON: of each step the seconds, the tokens that were predicted and the loss; peak memory; the loss of
held-out texts.
Nothing of the toolkit is imported.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.trainer_side import Clock, add_options, held_out, language_model_options, logged, rows, tell, train


def main() -> None:
    """Tokenise, cut into blocks, train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["trainer-best", "trainer-compiled"])
    parser.add_argument("--network", required=True, help="folder with the configuration and the tokenizer")
    parser.add_argument("--length", type=int, required=True, help="tokens of a block")
    parser.add_argument("--weight-decay", type=float, required=True)
    parser.add_argument("--final-share", type=float, required=True, help="of the learning rate, at the end")
    add_options(parser)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.network)
    texts = {name: tokenised(rows(options, name), tokenizer) for name in ("train", "test")}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.network))
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **language_model_options(options),
            weight_decay=options.weight_decay,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": options.final_share},
            torch_compile=options.peer == "trainer-compiled",
        ),
        train_dataset=blocks(texts["train"], options.length),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    peak = train(trainer)
    end = tokenizer.eos_token_id
    after = held_out(model, (([end, *ids], [end, *ids]) for ids in texts["test"]))
    tokens = options.micro_batch * options.accumulate * (options.length - 1)
    losses = logged(trainer, "loss")
    tell(clock, peak, losses=losses, tokens=[tokens] * len(losses), after=after, parameters=model.num_parameters())


def tokenised(texts: Dataset, tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, and the end token behind them."""
    found = tokenizer(texts["text"][:], add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in found["input_ids"]]


def blocks(texts: list[list[int]], length: int) -> Dataset:
    """All texts end to end, cut into blocks of so many tokens; the rest is dropped."""
    flat = list(chain.from_iterable(texts))
    cut = [flat[start : start + length] for start in range(0, len(flat) - length + 1, length)]
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


if __name__ == "__main__":
    main()
