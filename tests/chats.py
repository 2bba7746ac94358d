"""A small, real tokenizer with a chat template, a small network for it, and conversations that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<eot>", "<turn>")
ANSWERS = {
    "What colour has the sky?": "The sky is blue.",
    "天空是什么颜色?": "天空是蓝色的。",
    "Who sings?": "A bird sings.",
}


def chat_tokenizer(template: str | None = CHATML, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Bytes, some words, and the special tokens of several families."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*ANSWERS, *ANSWERS.values()] * 5 + ["assistant user system"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=end,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def save_chat_model(folder: Path, template: str | None = CHATML) -> Path:
    """A Llama of two blocks with that tokenizer, as transformers saves it."""
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(1)
    network = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,  # as base models have it: a text's end, not an answer's
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(network).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 120) -> Path:
    """Conversations of one to three turns, in both languages, some behind a system's message."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages: list[dict[str, Any]] = []
            if number % 3 == 0:
                messages.append({"role": "system", "content": f"Be brief, {number}."})
            for turn in range(rng.randint(1, 3)):
                question = rng.choice([*ANSWERS])
                messages.append({"role": "user", "content": f"{number}/{turn}: {question}"})
                messages.append({"role": "assistant", "content": ANSWERS[question]})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path
