"""Forward and backward of a step for networks of several kinds: as computed here, and as transformers does it.

    python benchmarks/step_by_network.py
    python benchmarks/step_by_network.py --network t5

Each network has random weights and the sizes of a known small one: BERT-base, T5 v1.1 small, Llama (6 blocks of 512),
ViT-small. The batch has 32 texts of lognormal lengths (mean about 60 tokens, at most 256), for T5 with answers a
quarter as long, for ViT 16 images of 224 × 224. Ours: no padding, our attention and dropout, bf16 copies of the
weights. The peer: the padded batch under bf16 autocast with torch's attention. Both compute the same loss, which is
checked without dropout before the clock starts, and take turns in one process. No optimizer, no loading of data.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

from benchmarks.side_by_side import Figures, add_options, in_turns, machine, show, summary, write
from toolkit.compute import remove_padding, replace_dropout
from toolkit.precision import Reduced

TEXTS, LONGEST, IMAGES, CLASSES = 32, 256, 16, 5
GOALS = {"bert": 2.0, "t5": 2.0, "llama": 2.0, "vit": 1.0}
APART = 0.02
"""Largest difference of the two losses, relative: both are in bf16, and round in different places."""
Inputs = dict[str, torch.Tensor]


def main() -> None:
    """Measure in turns; print a table and one line of JSON for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(GOALS), nargs="+", default=list(GOALS), help="(default: all)")
    add_options(parser)
    options = parser.parse_args()
    for name in options.network:
        compare(name, options)


def compare(name: str, options: argparse.Namespace) -> None:
    """One network."""
    torch.manual_seed(0)
    model, inputs, targets = NETWORKS[name]()
    ours = copy.deepcopy(model)
    if why := remove_padding(ours):
        raise SystemExit(f"{name} is padded: {why}")
    replace_dropout(ours)
    reduced = Reduced(ours, torch.bfloat16)

    def ours_step() -> float:
        loss = cross_entropy(reduced.forward(inputs).logits.float().flatten(0, -2), targets.flatten())
        reduced.backward(loss)
        reduced.forget()
        ours.zero_grad()
        return float(loss)

    def peer_step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        loss = cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        return float(loss)

    steps = {"ours": ours_step, "peer": peer_step}
    model.eval(), ours.eval()
    losses = {side: step() for side, step in steps.items()}
    if abs(losses["ours"] - losses["peer"]) > APART * losses["peer"]:
        raise SystemExit(f"{name}: the losses are apart: {losses}")
    model.train(), ours.train()
    for step in steps.values():
        step()
    runs = in_turns({side: timed(step) for side, step in steps.items()}, options.rounds, "steps_per_second")
    result = {"benchmark": "step_by_network", "network": name, "against": "padded, autocast"}
    result |= summary(runs, "steps_per_second", GOALS[name]) | {"losses": losses, **machine()}
    names = {"ours": f"{name}, as here", "peer": "padded, under autocast"}
    show(result, names, digits=2)
    write(result, options, names, name)


def timed(step: Callable[[], float]) -> Callable[[int], Figures]:
    """Steps a second of one step."""

    def run(number: int) -> Figures:
        began = time.perf_counter()
        step()
        return {"steps_per_second": 1 / (time.perf_counter() - began)}

    return run


def texts(median: float, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask."""
    lengths = (torch.randn(TEXTS) * 0.7).exp().mul(median).clamp(4, LONGEST).long()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.randint(10, vocabulary, mask.shape) * mask, mask.long()


def classifier(config: Any) -> tuple[Any, Inputs, torch.Tensor]:
    """Of texts."""
    ids, mask = texts(49, config.vocab_size)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return AutoModelForSequenceClassification.from_config(config), inputs, torch.arange(TEXTS) % CLASSES


def bert() -> tuple[Any, Inputs, torch.Tensor]:
    """BERT-base."""
    return classifier(BertConfig(num_labels=CLASSES))


def llama() -> tuple[Any, Inputs, torch.Tensor]:
    """A small Llama, with shared keys and values."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    return classifier(LlamaConfig(**sizes, num_key_value_heads=4, pad_token_id=0, num_labels=CLASSES))


def t5() -> tuple[Any, Inputs, torch.Tensor]:
    """T5 v1.1 small."""
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    ids, mask = texts(49, config.vocab_size)
    answers, answer_mask = texts(12, config.vocab_size)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"decoder_input_ids": answers, "decoder_attention_mask": answer_mask}
    return AutoModelForSeq2SeqLM.from_config(config), inputs, answers.masked_fill(answer_mask == 0, -100)


def vit() -> tuple[Any, Inputs, torch.Tensor]:
    """ViT-small."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    model = AutoModelForImageClassification.from_config(ViTConfig(**sizes, num_labels=CLASSES))
    return model, {"pixel_values": torch.randn(IMAGES, 3, 224, 224)}, torch.arange(IMAGES) % CLASSES


NETWORKS: dict[str, Callable[[], tuple[Any, Inputs, torch.Tensor]]] = {
    "bert": bert,
    "t5": t5,
    "llama": llama,
    "vit": vit,
}


if __name__ == "__main__":
    main()
