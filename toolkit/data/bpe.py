"""A tokenizer trained on the data: byte-level BPE, so that no character of any language is unknown to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from toolkit.config import DecoderConfig, TokenizerConfig
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.text_corpus import TextCorpus
from toolkit.environment import is_main_rank
from toolkit.errors import ConfigError
from toolkit.models import load_tokenizer

END, PADDING = "<|endoftext|>", "<|padding|>"
_REVISION = 1


def decoder_tokenizer(model: DecoderConfig, config: TokenizerConfig, corpus: TextCorpus) -> Any:
    """The tokenizer that is named, else that of the model to go on from, else one trained on the texts.

    Raises:
        ConfigError: a size for one that is not to be trained.
        ModelError: there is none under that name.
    """
    if config.name is None and model.name is None:
        return trained_tokenizer(corpus, config.vocabulary, config.train_bytes)
    unset = TokenizerConfig()
    for key in ("vocabulary", "train_bytes"):
        if getattr(config, key) != getattr(unset, key):
            raise ConfigError(
                f"--tokenizer.{key} has no effect on a tokenizer that is there ({config.name or model.name})",
                "Drop it, or leave the names out to train one.",
            )
    return load_tokenizer(model if config.name is None else DecoderConfig(name=config.name), pads=False)


def trained_tokenizer(
    corpus: TextCorpus,
    vocabulary: int,
    most_bytes: int,
    *,
    words: Callable[[str], str] = str,
    ends: bool = False,
) -> Any:
    """A tokenizer of transformers, trained on the training texts; the second call with the same content loads it.

    Digits stand alone, for numbers to be read alike. Its one end token also begins a text.

    Args:
        corpus: the texts.
        vocabulary: number of tokens, special ones and the 256 bytes among them.
        most_bytes: of text that it is trained on.
        words: what a text of the corpus says, where that is not all of it.
        ends: whether the end token is put behind each text, as encoders and decoders of two texts want it.
    """
    name = fingerprint("bpe", _REVISION, corpus.fingerprint, vocabulary, most_bytes, *(["ends"] if ends else []))
    texts = functools.partial(_some, corpus.splits["train"], most_bytes, words)
    show = is_main_rank() and most_bytes > 20_000_000 and len(corpus.splits["train"]) > 10_000
    return prepared(name, _load, functools.partial(_train, texts, vocabulary, ends, show))


def _load(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return None


def _train(
    texts: Callable[[], Iterator[str]], vocabulary: int, ends: bool, show: bool, result: Path, scratch: Path
) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if ends:
        end = (END, tokenizer.token_to_id(END))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(result)


def _some(texts: Dataset, most_bytes: int, words: Callable[[str], str]) -> Iterator[str]:
    left = most_bytes
    for batch in texts.shuffle(seed=0).iter(100):  # sources stand one behind the other
        for text in map(words, batch["text"]):
            if left <= 0:
                return
            left -= len(text.encode("utf-8", "surrogatepass"))
            yield text
