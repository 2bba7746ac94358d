"""Near-duplicate removal at scale: seconds, memory, and what is found of what is there.

    python benchmarks/near_duplicates.py
    python benchmarks/near_duplicates.py --sample peoples-daily --texts 20000

New texts of `--characters` are put together of sentences of a sample, in random order, and a share of them is followed
by a copy in which each word (in Chinese: character) may be replaced, with a probability that differs from copy to copy.
So copies lie on both sides of the threshold, and texts that are none have sentences in common, as texts of the web do.

`text_corpus` then prepares them without near-duplicate removal and with it, each in a process of its own. The cost is
the difference. Memory is that of the process and its workers together, without pages of files, which the system takes
back when it needs them. What is found is held against sets of tuples of words, which are compared in full, for all
pairs of a text and its copy.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks.lines import write_line
from benchmarks.side_by_side import Figures, machine, run
from toolkit.config import CorpusConfig
from toolkit.data import text_corpus
from toolkit.data.contents import split_words
from toolkit.data.files import ROLES
from toolkit.samples import fetch

MOST_EDITS = 0.04
"""Largest probability that a word of a copy is another one."""


def main() -> None:
    """Make the texts, measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="bbc-news", help="whose sentences (default: bbc-news)")
    parser.add_argument("--texts", type=int, default=100_000, help="copies among them (default: 100,000)")
    parser.add_argument("--characters", type=int, default=2_000, help="of a text (default: 2,000)")
    parser.add_argument("--copies", type=float, default=0.2, help="share of the texts (default: 0.2)")
    parser.add_argument("--threshold", type=float, default=0.8, help="Jaccard similarity (default: 0.8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as a line of JSON")
    parser.add_argument("--side", choices=["with", "without"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.file = Path(folder) / "texts.jsonl"
        pairs = make(options)
        result: Figures = {"benchmark": "near_duplicates", "sample": options.sample, "texts": options.texts}
        result |= {"characters": options.characters, "threshold": options.threshold}
        for side in ("without", "with"):
            command = [sys.executable, __file__, "--file", str(options.file), "--side", side]
            result[side] = json.loads(run([*command, "--threshold", str(options.threshold)]).splitlines()[-1])
        result["texts_a_second"] = round(options.texts / (result["with"]["seconds"] - result["without"]["seconds"]))
        result |= found(pairs, options)
    write_line(result | machine(), options.json)


def make(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Write the texts; return those that have a copy, and the copies."""
    chance = random.Random(0)
    with (fetch(options.sample) / "data.jsonl").open(encoding="utf-8") as lines:
        whole = [json.loads(line)["text"] for line in lines]
    sentences = [found.strip() for text in whole for found in re.findall(r"[^.。！？!?]+[.。！？!?]", text)]
    # None so long that two texts with it in common are alike.
    sentences = [sentence for sentence in sentences if len(sentence) < options.characters / 10]
    words = [word for sentence in chance.sample(sentences, 1000) for word in pieces(sentence)]
    copies = round(options.texts * options.copies)
    texts = [compose(sentences, options.characters, chance) for _ in range(options.texts - copies)]
    pairs = []
    for text in texts[:copies]:
        share = chance.uniform(0, MOST_EDITS)
        edited = [chance.choice(words) if chance.random() < share else word for word in pieces(text)]
        if edited != pieces(text):  # else it is a repeat
            pairs.append((text, "".join(edited)))
    texts += [copy for _, copy in pairs]
    chance.shuffle(texts)
    options.file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return pairs


def pieces(text: str) -> list[str]:
    """Words with the blank behind them, or Chinese characters."""
    return re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+\s*|\s+", text)


def compose(sentences: list[str], characters: int, chance: random.Random) -> str:
    """A text of random sentences."""
    chosen: list[str] = []
    while sum(map(len, chosen)) < characters:
        chosen.append(chance.choice(sentences))
    return " ".join(chosen)


def measure(options: argparse.Namespace) -> Figures:
    """Prepare the texts in this process."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], sum(anonymous_bytes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before, began, busy_before = sum(anonymous_bytes()), time.perf_counter(), sum(os.times()[:4])
    corpus = text_corpus(settings(options, options.side == "with"))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    dropped = {reason: count for reason, count in corpus.facts["dropped"].items() if count}
    busy = sum(os.times()[:4])  # of this process and its workers
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy - busy_before, 1),
        "growth_mib": round((most[0] - before) / 2**20),
        "dropped": dropped,
    }


def settings(options: argparse.Namespace, near: bool) -> CorpusConfig:
    """Of the preparation."""
    return CorpusConfig(name=(str(options.file),), near_duplicates=options.threshold if near else None)


def anonymous_bytes() -> Iterator[int]:
    """Memory of this process and of each of its workers, without pages of files."""
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            memory = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue  # it has ended
        # What a worker shares with its parent counts once.
        yield 1024 * int((re.findall(r"Pss_Anon:\s+(\d+)", memory) or [0])[0])


def found(pairs: list[tuple[str, str]], options: argparse.Namespace) -> dict[str, Any]:
    """Recall and precision over the pairs, against sets that are compared in full."""
    corpus = text_corpus(settings(options, True))
    left = {text for role in ROLES for text in corpus.splits[role]["text"]}
    alike = [similarity(*pair) >= options.threshold for pair in pairs]
    gone = [not left.issuperset(pair) for pair in pairs]
    right = sum(a and g for a, g in zip(alike, gone, strict=True))
    return {
        "pairs": len(pairs),
        "alike": sum(alike),
        "dropped": sum(gone),
        "recall": round(right / sum(alike), 4),
        "precision": round(right / sum(gone), 4),
    }


def similarity(one: str, other: str) -> float:
    """Of Jaccard, of the sets of runs: five words, or nine Chinese characters, or as much of both."""
    first, second = (set(runs(split_words(text))) for text in (one, other))
    return len(first & second) / len(first | second)


def runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Each from its first word on, to where it has the weight of five words."""
    weights = [3 if re.match(r"[\u3040-\u9fff]", word) else 5 for word in words]
    for begin in range(len(words)):
        weight, end = 0, begin
        while weight < 25 and end < len(words):
            weight, end = weight + weights[end], end + 1
        if weight >= 25:
            yield tuple(words[begin:end])


if __name__ == "__main__":
    main()
