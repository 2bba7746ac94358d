"""What each strategy sends, and what slow links make of it: ranks in network namespaces, as if on hosts of their own.

    sudo python benchmarks/scaling.py
    sudo python benchmarks/scaling.py --ranks 2 --links --steps 250 --strategies ddp "ddp, powersgd" diloco

A small BERT (random weights, no dropout, fp32) learns real texts with one global batch on 1, 2 and 4 gloo ranks, each
in a network namespace of its own, with one thread on one core: rank r on core r modulo the cores, so that 4 ranks on 2
cores share them. The namespaces hang on one bridge, and token buckets (tc's tbf) hold every link to a rate in each
direction. A delay is not added; that would take the kernel's netem, which not every kernel has.

- Bytes: what the rank's interface counts as sent (tx_bytes), headers and acknowledgements too, a step and rank.
- Minimum: with M bytes of weights in fp32 on n ranks, (n-1)/n times
  2M for ddp, the ring all-reduce (Patarasuk and Yuan 2009), 1M with bf16, and with PowerSGD 2 times the narrow matrices
  and what is sent in full (Vogels et al. 2019); 6M for diloco, weights and moments, once in 20 steps (Douillard et al.
  2023); 2M for zero1 and zero2, 3M for zero3 (Rajbhandari et al. 2020); for fsdp 3 times the blocks and 2 times the
  root, which stays gathered; hybrid the same within a group, and an all-reduce of the shard between the groups.
- Hidden: the share of the time on the wire (bytes / rate) that does not lengthen the step: (computing alone + wire -
  step) / wire, where computing alone is the plain model on as many ranks that do not talk, with as many samples each.
  What a strategy computes for itself counts as not hidden, so it may be below zero.
- Loss: the mean of the last ten steps, beside that of ddp without compression; for diloco of the ranks' own weights. In
  the default's 40 steps little is learnt; the second command shows what sending less costs.

It needs root, iproute2, and the samples of tokenizer and texts (fetched once). The default takes some minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lines import write_line
from benchmarks.scaling_net import INTERFACE, Network, unable

ROOT = Path(__file__).resolve().parent.parent
MEETING = 20
"""Steps of diloco that ranks take alone; fewer in a shorter run."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "ddp, bf16": {"name": "ddp", "compress": "bf16"},
    "ddp, powersgd": {"name": "ddp", "compress": "powersgd"},
    "diloco": {"name": "diloco", "local_steps": MEETING},
    "fsdp": {"name": "fsdp"},
    "hybrid": {"name": "fsdp", "shard_size": 2},
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3"},
}
"""`hybrid` needs 4 ranks; `single` is the computing alone."""
PORT = 29500
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Measure; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--links", type=int, nargs="*", default=[1000, 100], help="Mbit/s (default: 1000 100)")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--steps", type=int, default=40, help="before the loss is read (default: 40)")
    parser.add_argument("--timed", type=int, default=3, help="steps that are timed on each link (default: 3)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step on all ranks (default: 32)")
    parser.add_argument("--length", type=int, default=32, help="longest text in tokens (default: 32)")
    parser.add_argument("--width", type=int, default=128, help="of the network (default: 128)")
    parser.add_argument("--layers", type=int, default=4, help="of the network (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the JSON line to this file too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw seconds a step by link")
    options = parser.parse_args()
    if reason := unable():
        raise SystemExit(reason)
    for number in STOPS:
        signal.signal(number, stop)
    result = facts(options) | {"rows": [row for ranks in options.ranks for row in measure(ranks, options)]}
    add_ratios(result)
    show(result)
    write_line(result, options.json)
    if options.plot:
        plot(result, options.plot)


def stop(number: int, _: object) -> None:
    """End by way of all that must be removed, which a second signal does not cut short."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def measure(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each strategy on so many ranks."""
    chosen = {name: STRATEGIES[name] for name in options.strategies if name != "hybrid" or ranks == 4}
    if "diloco" in chosen:
        chosen["diloco"] = chosen["diloco"] | {"local_steps": min(MEETING, options.steps // 2)}
    width = options.width
    sizes = {"hidden_size": width, "num_hidden_layers": options.layers, "intermediate_size": 4 * width}
    plan = {
        "sizes": sizes | {"num_attention_heads": max(1, width // 32), "max_position_embeddings": options.length},
        "length": options.length,
        "batch": options.batch,
        "steps": options.steps,
        "timed": options.timed,
        "links": {f"{rate} Mbit/s": rate * 10**6 for rate in options.links},
        "strategies": chosen if ranks > 1 else {},
    }
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        network = stack.enter_context(Network(ranks))
        errors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scaling_")))
        processes = [start(network, rank, plan, errors / f"{rank}") for rank in range(ranks)]
        first = processes[0]
        assert first.stdin is not None
        assert first.stdout is not None
        for line in first.stdout:
            said = json.loads(line)
            if "link" in said:
                network.shape(said["link"])
                first.stdin.write("done\n")
                first.stdin.flush()
            else:
                rows.append(said)
                print(f"{time.strftime('%X')} {ranks} ranks, {said['strategy']}", file=sys.stderr, flush=True)
        if len(rows) != len(plan["strategies"]) + 1 or any(process.wait() for process in processes):
            texts = [f"rank {rank}: {(errors / f'{rank}').read_text()[-2000:]}" for rank in range(ranks)]
            raise SystemExit("the ranks failed:\n" + "\n".join(texts))
    return rows


def start(network: Network, rank: int, plan: dict[str, Any], errors: Path) -> subprocess.Popen[str]:
    """One rank on a host of its own, which ends with it."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    if network.size > 1:
        numbers = {"RANK": rank, "WORLD_SIZE": network.size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        environment |= {name: str(number) for name, number in numbers.items()}
        environment |= {"MASTER_ADDR": network.address(0), "MASTER_PORT": str(PORT)}
    command = network.inside(rank, rank % (os.cpu_count() or 1))
    command += [sys.executable, str(ROOT / "benchmarks" / "scaling_job.py"), json.dumps(plan)]
    with errors.open("w") as file:
        # In a session of its own, or Ctrl-C would reach it too.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
            start_new_session=True,
        )


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and of which machine."""
    return {
        "benchmark": "scaling",
        "steps": options.steps,
        "timed": options.timed,
        "batch": options.batch,
        "length": options.length,
        "width": options.width,
        "layers": options.layers,
        "links": {f"{rate} Mbit/s": rate * 10**6 for rate in options.links},
        "load": [round(load, 1) for load in os.getloadavg()],
        "torch": importlib.metadata.version("torch"),
        "deepspeed": importlib.metadata.version("deepspeed"),
        "kernel": platform.release(),
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def add_ratios(result: dict[str, Any]) -> None:
    """Hidden shares, and the loss beside that of ddp."""
    rows = result["rows"]
    alone = {row["ranks"]: row["seconds"]["unlimited"] for row in rows if row["strategy"] == "single"}
    losses = {row["ranks"]: row["loss"] for row in rows if row["strategy"] == "ddp"}
    for row in rows:
        talks = row["strategy"] != "single"
        row["hidden"] = {}
        for name, rate in result["links"].items() if talks else ():
            wire = row["bytes"] * 8 / rate
            row["hidden"][name] = round((alone[row["ranks"]] + wire - row["seconds"][name]) / wire, 3)
        row["loss_above_ddp"] = row["loss"] - losses[row["ranks"]] if talks and row["ranks"] in losses else None


def show(result: dict[str, Any]) -> None:
    """The table; what is hidden stands behind the seconds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    links = ["unlimited", *result["links"]]
    for heading in ("ranks", "strategy", "MB sent", "minimum", "ratio", *links, "loss", "– ddp's"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right", no_wrap=True)
    for row in result["rows"]:
        least, above = row["minimum"], row["loss_above_ddp"]
        times = [f"{row['seconds'][link] * 1e3:.0f} ms" if link in row["seconds"] else "" for link in links]
        hidden = [f" ({row['hidden'][link]:.0%})" if link in row["hidden"] else "" for link in links]
        alone = row["strategy"] == "single"
        sizes = ["", "", ""] if alone else [f"{row['bytes'] / 1e6:.2f}", f"{least / 1e6:.2f}"]
        sizes += [] if alone else [f"{row['bytes'] / least:.2f}"]
        table.add_row(
            str(row["ranks"]),
            "computing alone" if alone else row["strategy"],
            *sizes,
            *map("".join, zip(times, hidden, strict=True)),
            "" if alone and row["ranks"] > 1 else f"{row['loss']:.4f}",
            "" if above is None else f"{above:+.4f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print("seconds a step (hidden share of the time on the wire); MB a step and rank")


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds a step by link, one panel for each number of ranks."""
    from matplotlib.figure import Figure

    counts = sorted({row["ranks"] for row in result["rows"]} - {1})
    figure = Figure(figsize=(4.5 * len(counts), 4), layout="constrained")
    for axes, ranks in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        rows = [row for row in result["rows"] if row["ranks"] == ranks and row["strategy"] != "single"]
        for number, link in enumerate(["unlimited", *result["links"]]):
            places = [place + 0.25 * number for place in range(len(rows))]
            axes.barh(places, [row["seconds"][link] for row in rows], height=0.25, label=link)
        axes.set_yticks([place + 0.25 for place in range(len(rows))], [row["strategy"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("seconds a step")
        axes.set_title(f"{ranks} ranks")
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
