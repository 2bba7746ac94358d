"""From `accelerate launch` to the first optimizer step: this toolkit's recipe against the Trainer's script.

    python benchmarks/start_vs_trainer.py

Both fine-tune MiniLM on the same texts with a global batch of 32 for one step, started alike with `accelerate launch`
on one CPU process, in turns. What both may keep from a start before is there: tokenised texts in the cache of datasets,
modules as bytecode, files in the page cache. The recipe evaluates 32 texts before its first step, and writes its plan
and its folder; the Trainer's script does not. The figure is seconds until
the first step begins; those until it ends are told beside, for the Trainer at its best begins with the longest texts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an image's setting; each start would compile the modules anew

from benchmarks.bert_cls_vs_trainer import BATCH, peer_script, recipe, write_texts
from benchmarks.side_by_side import Figures, add_options, in_turns, machine, median, run, show, summary, write
from toolkit import samples

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "accelerate" / "cpu1.yaml"
GOAL = 0.8


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="texts to learn (default: 1024)")
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start_vs_trainer_") as name:
        folder, model = Path(name), str(samples.fetch("minilm"))
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        write_texts(folder, "lognormal", options.rows)
        sides = {
            "ours": lambda number: ours(folder, number, model),
            "peer": lambda number: peer(folder, model),
        }
        for warm in sides.values():
            warm(-1)
        runs = in_turns(sides, options.rounds, "seconds")
    result = {"benchmark": "start_vs_trainer", "against": "trainer-best"}
    result |= summary(runs, "seconds", GOAL, smaller=True)
    result |= {"to_its_end": {side: round(median(runs[side], "to_its_end"), 2) for side in runs}}
    result |= {"rows": options.rows, **machine()}
    names = {"ours": "recipes/bert_cls.py", "peer": "Trainer"}
    show(result, names)
    print(f"to its end: {result['to_its_end']['ours']} against {result['to_its_end']['peer']} seconds")
    write(result, options, names, "From launch to the first step")


def ours(folder: Path, number: int, model: str) -> Figures:
    """The recipe, in a new folder each time."""
    target = folder / f"ours_{number}"
    began = launch(recipe(folder, target, model, steps=1))[0]
    metrics = target / "metrics.jsonl"
    ended = metrics.stat().st_mtime - began
    return {"seconds": ended - BATCH / json.loads(metrics.read_text())["samples_per_second"], "to_its_end": ended}


def peer(folder: Path, model: str) -> Figures:
    """The Trainer's script, with the same arguments each time: the cache of datasets knows its function by them."""
    began, printed = launch(peer_script(folder, folder / "peer", model, 1, "trainer-best"))
    found = json.loads(printed.splitlines()[-1])
    seconds = found["began"] - began
    return {"seconds": seconds, "to_its_end": seconds + found["seconds"][0]}


def launch(command: list[str]) -> tuple[float, str]:
    """The time of day when it was started, and what it printed."""
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(CONFIG)]
    return time.time(), run([*accelerate, *command])


if __name__ == "__main__":
    main()
