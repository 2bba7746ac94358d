"""Memory of a LoRA step on one model in fp32, bf16, 8 bits and 4 bits, side by side.

    python benchmarks/low_bit_memory.py
    python benchmarks/low_bit_memory.py --model sample:smollm2 --tokens 512

Each format is a process of its own, and they take turns. It loads the model in fp32, brings its linear layers to the
format (bf16: all of it), adds a LoRA of rank 16 to all linear layers, and takes one step of AdamW on random tokens, in
bf16 (the fp32 side in fp32). Measured are the bytes of the base's weights with their scales, and the growth of the peak
resident memory in the step over what the process held before it, plus those bytes: what a step needs, without the
libraries and without what loading in fp32 took. The ratios are to fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lines import write_line
from benchmarks.side_by_side import Figures, machine, median, run
from toolkit.adapters import add_adapter
from toolkit.compute import fuse_loss
from toolkit.config import AdapterConfig
from toolkit.memory import give_back_freed, peak_bytes
from toolkit.models import locate
from toolkit.precision import Reduced
from toolkit.quantization import QUANTIZATIONS, LowBit, weight_bytes

SIDES = ("fp32", "bf16", *QUANTIZATIONS[1:])
MIB = 2**20


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2", help="sample or folder (default: sample:smollm2)")
    parser.add_argument("--tokens", type=int, default=256, help="of the step (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.model, options.tokens)))
        return
    given = ["--model", options.model, "--tokens", str(options.tokens)]
    runs: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found = run([sys.executable, __file__, *given, "--side", side])
            runs[side].append(json.loads(found.splitlines()[-1]))
    figures = {
        side: {name: round(median(runs[side], name), 4) for name in ("base_mib", "step_mib", "loss")} for side in SIDES
    }
    whole = figures["fp32"]
    print(f"{'base':<12}{'weights, MiB':>14}{'of fp32':>9}{'a step, MiB':>14}{'of fp32':>9}{'loss':>9}")
    for side, its in figures.items():
        its |= {name.replace("mib", "ratio"): round(its[name] / whole[name], 4) for name in ("base_mib", "step_mib")}
        print(
            f"{side:<12}{its['base_mib']:>14,.1f}{its['base_ratio']:>9.3f}{its['step_mib']:>14,.1f}"
            f"{its['step_ratio']:>9.3f}{its['loss']:>9.4f}"
        )
    spread = {side: [round(f(r["step_mib"] for r in runs[side]), 1) for f in (min, max)] for side in SIDES}
    result = {"benchmark": "low_bit_memory", "model": options.model, "tokens": options.tokens, "rounds": options.rounds}
    write_line(result | {"figures": figures, "step_ranges": spread, **machine()}, options.json)


def measure(side: str, name: str, tokens: int) -> Figures:
    """One step in this process."""
    model = AutoModelForCausalLM.from_pretrained(locate(name), dtype=torch.float32)
    low_bit = LowBit() if side in ("fp32", "bf16") else LowBit(side)
    adapter = AdapterConfig(name="lora", targets=("all-linear",))
    model = add_adapter(model, adapter, seed=0, low_bit=low_bit).train()
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if side == "bf16":
        for parameter in frozen:
            parameter.data = parameter.data.bfloat16()
    base = sum(map(weight_bytes, frozen))
    assert fuse_loss(model) == ""  # a loss that needs no logits, which would hide the weights
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    reduced = None if side == "fp32" else Reduced(model, torch.bfloat16)
    ids = torch.randint(1000, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    forget_the_load()
    before = psutil.Process().memory_info().rss
    inputs = {"input_ids": ids, "labels": ids}
    loss = (reduced.forward(inputs) if reduced else model(**inputs)).logits.sum() / tokens
    reduced.backward(loss) if reduced else loss.backward()
    optimizer.step()
    step = peak_bytes(torch.device("cpu")) - before + base
    return {"base_mib": base / MIB, "step_mib": step / MIB, "loss": float(loss.detach())}


def forget_the_load() -> None:
    """Loading in fp32 has held the most so far: give it back, and let the kernel count anew (Linux, glibc)."""
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    main()
