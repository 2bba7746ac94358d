"""A matrix on the disk: its weights, the vocabulary that they are of, and how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from toolkit.config import ModelConfig
from toolkit.embeddings.targets import Target
from toolkit.embeddings.transfer import KINDS, Matrix, coverage
from toolkit.encoders import load_encoder
from toolkit.errors import ModelError
from toolkit.folders import written_aside
from toolkit.models import first_line, load_tokenizer

WEIGHTS, VOCABULARY, FACTS = "embeddings.safetensors", "vocabulary.json", "embeddings.json"
LIST = "vocabulary.txt"
_TENSOR = "weight"


def write_matrix(folder: Path, target: Target, matrix: Matrix, neighbours: Mapping[str, Any]) -> dict[str, Any]:
    """Write a matrix, in the place of what is there when all is written; returns what `embeddings.json` says.

    `embeddings.safetensors` has `weight` (vocabulary, features); `vocabulary.json` the id of each token, and
    `vocabulary.txt` the tokens in that order where each fits on a line; the tokenizer lies beside them, as
    transformers loads it; `README.md` tells of all this.
    """
    rows, features = matrix.weights.shape
    facts: dict[str, Any] = {
        "rows": rows,
        "features": features,
        "padding": target.tokenizer.pad_token_id,
        "vocabulary": target.name,
        **matrix.facts,
        **coverage(target, matrix),
        "neighbours": dict(neighbours),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(folder) as aside:
        target.tokenizer.save_pretrained(aside)
        save_file({_TENSOR: matrix.weights.contiguous()}, aside / WEIGHTS)
        tokens = target.tokenizer.convert_ids_to_tokens(list(range(rows)))
        ids = {token: number for number, token in enumerate(tokens) if token is not None}
        (aside / VOCABULARY).write_text(json.dumps(ids, ensure_ascii=False, indent=0), encoding="utf-8")
        if all(token and len(token.splitlines()) == 1 for token in tokens):
            (aside / LIST).write_text("\n".join(tokens) + "\n", encoding="utf-8")
        (aside / FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_card(facts), encoding="utf-8")
    return facts


def load_embedding(folder: str | Path, *, freeze: bool = False) -> nn.Embedding:
    """The layer of a folder that `write_matrix` has filled.

    Args:
        folder: with `embeddings.safetensors`.
        freeze: keep it from being trained.

    Raises:
        ModelError: the folder is none of these, or damaged.
    """
    weights, facts = _read(Path(folder))
    rows, features = weights.shape
    layer = nn.Embedding(rows, features, padding_idx=facts["padding"], _weight=weights)
    layer.weight.requires_grad_(not freeze)
    return layer


def word_vectors(name: str) -> tuple[Any, torch.Tensor]:
    """A tokenizer with a padding token, and a vector for each of its ids, (vocabulary, features) in fp32.

    Args:
        name: a folder that `write_matrix` has filled, or a model, whose input embedding is taken.

    Raises:
        ModelError: it is neither, or damaged.
    """
    folder = Path(name).expanduser()
    if not (folder / WEIGHTS).is_file():
        tokenizer = load_tokenizer(ModelConfig(name=name))
        model: Any = load_encoder(ModelConfig(name=name), seed=0)
        return tokenizer, model.get_input_embeddings().weight.detach().float().clone()
    weights, _ = _read(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which folder
        raise ModelError(f"{folder} has no tokenizer: {first_line(error)}", "Make the matrix again.") from error
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer in {folder} has no padding token, which batches of texts need",
            "Name one of its tokens as `pad_token` in tokenizer_config.json.",
        )
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # how this one was found has no place beside the model that is saved
    return tokenizer, weights


def _read(folder: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)[_TENSOR]
        whole = list(weights.shape) == [facts["rows"], facts["features"]]
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} is no whole matrix of embeddings: {first_line(error)}",
            "Make it with recipes/embedding_matrix.py.",
        ) from error
    if not whole:
        raise ModelError(f"{folder}: {WEIGHTS} and {FACTS} are not of one matrix", "Make it again.")
    return weights, facts


def _card(facts: Mapping[str, Any]) -> str:
    occurrences = facts.get("by_occurrence", {})
    lines = [
        f"| {kind} | {facts['by_kind'][kind]:,} | {f'{occurrences[kind]:.1%}' if occurrences else ''} |"
        for kind in KINDS
    ]
    padding = facts["padding"]
    return "\n".join(
        [
            "# Word embeddings\n",
            f"{facts['rows']:,} × {facts['features']}, for the vocabulary of {Path(facts['vocabulary']).name}, out of "
            f"{facts['source']}. The licences of both hold for it too.\n",
            "| rows | tokens | of all occurrences |",
            "|---|---|---|",
            *lines,
            "",
            "`exact` and `folded` rows are copied (the latter from a word in other case or width), `composed` ones are "
            "means over pieces, `drawn` ones are random, as spread out as the others; `special` tokens are drawn, and "
            "padding is zero.\n",
            "```python",
            "from safetensors.torch import load_file",
            "from torch import nn",
            "",
            f'weight = load_file("{WEIGHTS}")["{_TENSOR}"]',
            f"embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx={padding})",
            "```",
            "",
        ]
    )
