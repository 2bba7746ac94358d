"""A saved model that answers. Imports torch, transformers and datasets, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from toolkit.adapters import FILE, in_place, load_adapted
from toolkit.compute import remove_padding
from toolkit.data.tokenize import encode
from toolkit.errors import ConfigError, DataError, ModelError, NumericsError
from toolkit.folders import refuse_strays
from toolkit.predict.prediction import Prediction
from toolkit.predict.saved import SavedModel, first_line

BATCHES_OF_A_WINDOW = 16
"""Texts are sorted by length within a window and written window by window; the first ones are smaller."""
_FALLBACK_LENGTH = 512


class Classifier:
    """A saved model, ready to answer in fp32.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens to which a text is cut; by default as in the run.

    Attributes:
        labels: names of the classes, by index.
        max_length: tokens to which a text is cut, special tokens included.

    Raises:
        ConfigError: there is no such device, or the length is out of the model's range.
        ModelError: the files are damaged, or hold no classifier.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None) -> None:
        gpu = torch.cuda.is_available()
        if device == "cuda" and not gpu:
            raise ConfigError("--device cuda: there is no GPU that torch could use here", "Use --device cpu.")
        self._device = "cuda" if gpu and device != "cpu" else "cpu"
        self._tokenizer, model = _load(saved.folder)
        remove_padding(model)
        self._model = model.to(self._device).eval()
        self.labels: tuple[str, ...] = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ModelError(f"{saved.folder}: its labels are {', '.join(self.labels)}; it takes two, and no two alike")
        longest = _longest(self._tokenizer, model)
        shortest = self._tokenizer.num_special_tokens_to_add(pair=False) + 1
        if max_length is not None and not shortest <= max_length <= longest:
            raise ConfigError(
                f"--max-length {max_length}: this model takes {shortest} to {longest} tokens", "Choose among these."
            )
        self.max_length: int = max_length or saved.max_length or longest

    def stream(
        self, texts: Iterable[str], *, batch: int = 32, on_batch: Callable[[int], None] = lambda texts: None
    ) -> Iterator[list[Prediction]]:
        """`predict` over any number of texts, of which only a window is in memory at a time.

        The sizes of the windows depend on nothing but `batch`: the same texts are always padded alike.
        """
        rest, batches = iter(texts), 1
        while window := list(islice(rest, batches * batch)):
            yield self.predict(window, batch=batch, on_batch=on_batch)
            batches = min(2 * batches, BATCHES_OF_A_WINDOW)

    def predict(
        self, texts: Sequence[str], *, batch: int = 32, on_batch: Callable[[int], None] = lambda texts: None
    ) -> list[Prediction]:
        """The predictions for `texts`, in their order.

        Args:
            texts: none of them empty.
            batch: texts of one forward pass; those of similar length go together.
            on_batch: called after each forward pass with the number of its texts.

        Raises:
            DataError: the tokenizer finds no token in a text.
            ConfigError: the batch does not fit into the device's memory.
            NumericsError: the model's answer is not finite.
        """
        rows = self._tokenize(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for index, row in zip(chosen, self._probabilities([rows[i] for i in chosen]), strict=True):
                ranked = sorted(zip(self.labels, row, strict=True), key=lambda pair: -pair[1])
                found[index] = Prediction(texts[index], dict(ranked))
            on_batch(len(chosen))
        return [found[index] for index in range(len(texts))]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = encode(texts, self._tokenizer, self.max_length)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise DataError(f"the model's tokenizer finds no token in the text {text[:40]!r}", "Leave it out.")
        return rows

    def _probabilities(self, rows: Sequence[list[int]]) -> list[list[float]]:
        # The mask, and no token type ids: what training gives the model.
        inputs = self._tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt")
        try:
            with torch.inference_mode():
                tensors = {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}
                probabilities = self._model(**tensors).logits.float().softmax(-1)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{len(rows)} texts of up to {len(rows[0])} tokens do not fit into the GPU's memory",
                "Use a smaller --batch.",
            ) from error
        if not torch.isfinite(probabilities).all():
            raise NumericsError(
                "the model's answer is not finite", "Its weights are damaged, or its training diverged: see its report."
            )
        result: list[list[float]] = probabilities.tolist()
        return result


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model in `folder`: never from a hub, never with its own code, never a pickle."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        refuse_strays(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if (folder / FILE).is_file():  # an adapter, whose base comes from where the run had it from
            model, missing = in_place(load_adapted(folder)), []
        else:
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
            missing = sorted(report["missing_keys"])
    except ModelError:
        raise
    except Exception as error:  # each of the libraries below has its own; the user is to hear which folder it is
        raise ModelError(
            f"the model in {folder} cannot be loaded: {first_line(error)}", "Copy it again, or train again."
        ) from error
    if missing:
        raise ModelError(
            f"the model in {folder} lacks {len(missing)} of its weights ({', '.join(missing[:3])} …)",
            "Copy it again, or train again.",
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no padding token", "Save one that has.")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder finds the last token of a text
    return tokenizer, model


def _longest(tokenizer: Any, model: Any) -> int:
    """The most tokens that the model takes, as far as it says so."""
    positions = getattr(model.config, "max_position_embeddings", None) or _FALLBACK_LENGTH
    return int(min(positions, tokenizer.model_max_length or positions)) - getattr(model, "virtual_tokens", 0)
