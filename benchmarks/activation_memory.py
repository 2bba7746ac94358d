"""Memory and seconds of a training step with activations kept, or computed again in backward, side by side.

    python benchmarks/activation_memory.py
    python benchmarks/activation_memory.py --layers 12 --width 512 --tokens 4096

Each kind (`hub`, `none`, `selective`, `full`) is a process of its own, and they take turns. `hub` is `none` with norms
and gated layers as transformers has them, which keep more. Each makes a Llama, computes without padding and without
whole logits, and takes two steps of AdamW in bf16 on random texts of `--length` tokens. Measured in the second: seconds
of forward and backward, and the growth of the peak resident memory over what the process held before it. Weights,
moments and gradients were there, so this is what activations take, with the copies of the weights in bf16. The losses
must be equal to the bit, that of `hub` to 1e-3. The ratios are to `none`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lines import write_line
from benchmarks.low_bit_memory import forget_the_load
from benchmarks.side_by_side import Figures, machine, median, run
from toolkit.compute import checkpoint_activations, fuse_loss, keep_less, remove_padding
from toolkit.memory import peak_bytes
from toolkit.precision import Reduced

KINDS = ("hub", "none", "selective", "full")
MIB = 2**20


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks (default: 12)")
    parser.add_argument("--width", type=int, default=512, help="of the hidden states (default: 512)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the step (default: 4,096)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as a line of JSON")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options)))
        return
    sizes = {name: getattr(options, name) for name in ("layers", "width", "tokens", "length")}
    given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    runs: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            found = run([sys.executable, __file__, *given, "--kind", kind])
            runs[kind].append(json.loads(found.splitlines()[-1]))
    losses = {kind: {figures["loss"] for figures in its} for kind, its in runs.items()}
    theirs, ours = losses.pop("hub"), set.union(*losses.values())
    if len(ours) != 1 or any(abs(loss / max(ours) - 1) > 1e-3 for loss in theirs):
        sys.exit(f"the losses differ: {runs}")
    names = ("activations_mib", "seconds")
    figures = {kind: {name: round(median(its, name), 3) for name in names} for kind, its in runs.items()}
    print(f"{'kept':<12}{'activations, MiB':>18}{'of none':>9}{'seconds':>10}{'of none':>9}")
    for kind, its in figures.items():
        memory, seconds = (its[name] / figures["none"][name] for name in names)
        its |= {"memory_ratio": round(memory, 3), "seconds_ratio": round(seconds, 3)}
        print(f"{kind:<12}{its['activations_mib']:>18,.1f}{memory:>9.2f}{its['seconds']:>10.2f}{seconds:>9.2f}")
    ranges = {
        kind: {name: [round(f(each[name] for each in its), 3) for f in (min, max)] for name in names}
        for kind, its in runs.items()
    }
    result = {"benchmark": "activation_memory", **sizes, "rounds": options.rounds}
    write_line(result | {"figures": figures, "ranges": ranges, **machine()}, options.json)


def measure(options: argparse.Namespace) -> Figures:
    """Two steps in this process, of which the second counts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        vocab_size=8192,
        max_position_embeddings=options.length,
    )
    model = LlamaForCausalLM(config).train()
    assert fuse_loss(model) == ""
    assert remove_padding(model) == ""
    if options.kind != "hub":
        keep_less(model)
    if options.kind in ("selective", "full"):
        checkpoint_activations(model, options.kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    reduced = Reduced(model, torch.bfloat16)
    ids = torch.randint(8192, (options.tokens // options.length, options.length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        reduced.forget()
        forget_the_load()
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        loss = reduced.forward(inputs).logits.sum() / options.tokens
        reduced.backward(loss)
        seconds = time.perf_counter() - began
        grown = peak_bytes(torch.device("cpu")) - before
        optimizer.step()
    return {"activations_mib": grown / MIB, "seconds": seconds, "loss": float(loss.detach())}


if __name__ == "__main__":
    main()
