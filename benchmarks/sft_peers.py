"""The other side of `sft_vs_trl.py`: instruction tuning under TRL's SFTTrainer.

The loss counts the answers and the token that ends each (`assistant_only_loss`; the tokenizer's own template gets the
marks for that), in bf16 with fused AdamW, a process that loads and no activation checkpointing. LoRA is put on a base
in bf16; with `--full` all weights are trained, in fp32. `trl-padded` groups conversations by length and pads them;
`trl-packed` packs them into rows of the longest length, one to a forward pass.
Prints one line of JSON: of each step the seconds, the tokens that went through the network and the loss; peak memory;
the loss of held-out answers before and after.
Nothing of the toolkit is imported.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.trainer_side import Clock, add_options, held_out, language_model_options, logged, rows, tell, train

MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
"""What SmolLM2's template writes for a message."""
MARKED = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
"""The same, with marks around what is learnt."""


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["trl-padded", "trl-packed"])
    parser.add_argument("--model", required=True, help="folder with weights and a tokenizer")
    parser.add_argument("--max-length", type=int, required=True, help="tokens of the longest conversation")
    parser.add_argument("--rank", type=int, required=True, help="of the LoRA; 0 trains all weights")
    add_options(parser)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if MESSAGE not in tokenizer.chat_template:
        raise SystemExit(f"{options.model} has another chat template than SmolLM2")
    tokenizer.chat_template = tokenizer.chat_template.replace(MESSAGE, MARKED)
    packed = options.peer == "trl-packed"
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM") if options.rank else None
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if lora else torch.float32),
        args=SFTConfig(
            **language_model_options(options),
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            max_length=options.max_length,
            packing=packed,
            train_sampling_strategy="random" if packed else "group_by_length",
            assistant_only_loss=True,
            gradient_checkpointing=False,
        ),
        train_dataset=rows(options, "train"),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    peak = train(trainer)
    answers = [answered(row["messages"], tokenizer, options.max_length) for row in rows(options, "test")]
    after = held_out(trainer.model, answers)
    untrained = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(trainer.model.device)
    before = held_out(untrained, answers)
    seen = [0.0, *logged(trainer, "num_tokens")]
    tokens = [round(now - then) for then, now in pairwise(seen)]
    tell(clock, peak, losses=logged(trainer, "loss"), tokens=tokens, after=after, before=before)


def answered(messages: list[dict[str, Any]], tokenizer: Any, length: int) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and the same with -100 for all but those of its answers."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, marks = found["input_ids"][:length], found["assistant_masks"]
    return ids, [token if learnt else -100 for token, learnt in zip(ids, marks, strict=False)]


if __name__ == "__main__":
    main()
