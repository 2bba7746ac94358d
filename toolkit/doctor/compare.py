"""Whether all nodes are made of the same: code, packages, settings, data, driver, clock; and what is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.doctor.findings import Finding, ok
from toolkit.errors import LaunchError
from toolkit.requirements import check_versions

DECISIVE = ("python", "torch", "transformers", "accelerate", "deepspeed")
CLOCK_WARNING, CLOCK_ERROR = 1.0, 60.0
_SHOWN = 4

Facts = Mapping[int, Mapping[str, Any]]


def check_packages(node: str) -> Finding:
    """The installed packages are of versions that were tested."""
    try:
        check_versions()
    except LaunchError as error:
        return Finding("error", "versions", error.message, node, "a recipe refuses to start with them", error.remedy)
    return ok("versions", "within the tested ranges", node)


def compare_versions(names: Sequence[str], facts: Facts) -> list[Finding]:
    """All nodes have the same packages, driver and NCCL."""
    findings = []
    per_node = {rank: {**f["versions"], **f.get("machine", {})} for rank, f in facts.items()}
    for package in sorted({key for versions in per_node.values() for key in versions}):
        found = {rank: versions.get(package, "missing") for rank, versions in per_node.items()}
        for rank, version in _differing(found).items():
            findings.append(
                Finding(
                    "error" if package in (*DECISIVE, "nccl") else "warning",
                    "versions",
                    f"{package} {version}, where {names[_usual(found)]} has {found[_usual(found)]}",
                    names[rank],
                    "ranks of different versions may compute different numbers, or wait for one another for ever",
                    "Make the environment anew on that node: pip install -c constraints.txt -e .",
                )
            )
    return findings or [ok("versions", f"the same on all {len(facts)} nodes")]


def compare_code(names: Sequence[str], facts: Facts) -> list[Finding]:
    """All nodes run the same files."""
    usual = _usual({rank: sorted(f["code"].items()) for rank, f in facts.items()})
    findings = []
    for rank, found in facts.items():
        here, there = found["code"], facts[usual]["code"]
        other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if other:
            findings.append(
                Finding(
                    "error",
                    "code",
                    f"{len(other)} files differ from those of {names[usual]}: {_some(other)}",
                    names[rank],
                    "ranks of different code wait for one another, or train something else than you think",
                    "Bring both to the same commit, or start from one folder that all nodes share.",
                )
            )
    return findings or [ok("code", f"{len(facts[usual]['code'])} files are the same on all {len(facts)} nodes")]


def compare_settings(names: Sequence[str], facts: Facts) -> list[Finding]:
    """All nodes understand the recipe's options alike."""
    with_settings = {rank: f for rank, f in facts.items() if f.get("digest")}
    if not with_settings:
        return []
    usual = _usual({rank: f["digest"] for rank, f in with_settings.items()})
    there, findings = with_settings[usual]["settings"], []
    for rank, found in with_settings.items():
        if found["digest"] == with_settings[usual]["digest"]:
            continue
        here = found["settings"]
        other = [key for key in {**there, **here} if here.get(key) != there.get(key)]
        told = [f"{key} is {here.get(key)!r}, there {there.get(key)!r}" for key in other]
        findings.append(
            Finding(
                "error",
                "settings",
                f"other than on {names[usual]}: {_some(told) or 'a secret'}",
                names[rank],
                "ranks refuse to train together, after each has loaded its model",
                "Start all nodes with the same options and the same --config file.",
            )
        )
    return findings or [ok("settings", f"{len(there)} keys are the same on all {len(facts)} nodes")]


def check_data(names: Sequence[str], facts: Facts) -> list[Finding]:
    """All nodes mean the same data, and have them prepared; one alone may take its time to."""
    mistakes = [
        Finding("error", "recipe", found["mistake"], names[rank], "the recipe would refuse it", found["remedy"])
        for rank, found in facts.items()
        if found.get("mistake")
    ]
    known = {rank: found for rank, found in facts.items() if "data" in found}
    if not known:
        return mistakes
    # Prepared and not: a node that has prepared less knows fewer, and those that both know are compared.
    prints = {rank: [*filter(None, [*found["data"], found["unprepared"]])] for rank, found in known.items()}
    usual = max(prints, key=lambda rank: len(prints[rank]))
    findings = []
    for rank, own in prints.items():
        if any(one != other for one, other in zip(own, prints[usual], strict=False)):
            fact = f"other data than on {names[usual]} (fingerprint {own[-1][:12]}, there {prints[usual][-1][:12]})"
            why = "ranks that read other data refuse to train together, after each has prepared its own"
            mend = "Copy the files anew, or name files on a file system that all nodes share."
            findings.append(Finding("error", "data", fact, names[rank], why, mend))
        elif known[rank]["unprepared"]:
            findings.append(_unprepared(names[rank], alone=len(facts) == 1))
    if not findings and prints[usual]:
        findings = [ok("data", f"prepared (fingerprint {prints[usual][-1][:12]})")]
    return mistakes + findings


def _unprepared(node: str, *, alone: bool) -> Finding:
    if alone:
        return ok("data", "not prepared yet: the run will begin by that", node)
    return Finding(
        "warning",
        "data",
        "not prepared yet: the first rank of this node will clean and tokenise them",
        node,
        "all GPUs wait for that, and the other nodes give up after 30 minutes",
        "For large data, run `toolkit data show RECIPE OPTIONS` once on a node, with TOOLKIT_CACHE on a file system "
        "that all nodes share.",
    )


def check_clocks(names: Mapping[int, str], offsets: Mapping[int, Sequence[float]]) -> list[Finding]:
    """No clock is far from the first node's: (seconds ahead, uncertainty) by rank."""
    findings = []
    for rank, (ahead, uncertain) in offsets.items():
        if abs(ahead) - uncertain < CLOCK_WARNING:
            continue
        findings.append(
            Finding(
                "error" if abs(ahead) >= CLOCK_ERROR else "warning",
                "clock",
                f"{abs(ahead):,.1f} s {'ahead of' if ahead > 0 else 'behind'} that of {names[0]}",
                names[rank],
                "logs, file times and locks of shared file systems, schedulers and certificates go by it",
                "Let it follow a time server: `timedatectl set-ntp true`, or chrony.",
            )
        )
    if offsets and not findings:
        worst = max(abs(ahead) for ahead, _ in offsets.values())
        findings = [ok("clock", f"within {max(worst, max(u for _, u in offsets.values())) * 1e3:.1f} ms")]
    return findings


def check_shared(names: Sequence[str], facts: Facts) -> list[Finding]:
    """The run's folder is the same on all nodes: what the first one has left there is seen by the others."""
    path, findings = facts[0].get("run", ""), []
    for rank, found in facts.items():
        if rank == 0 or found.get("shared") is None or not path or not found["run"]:
            continue
        if found["run"] != path:
            fact = f"the run folder is {found['run']}, and on {names[0]} {path}"
        elif not found["shared"]:
            fact = f"{path} is not the folder of that name on {names[0]}"
        else:
            continue
        findings.append(
            Finding(
                "error",
                "run folder",
                fact,
                names[rank],
                "checkpoints are written by all ranks into one folder, and could not be put together",
                "Name a folder on a file system that all nodes share: --run.dir.",
            )
        )
    if path and not findings and any(found.get("shared") for found in facts.values()):
        findings = [ok("run folder", f"{path} is shared by all {len(facts)} nodes")]
    return findings


def check_hub(node: str, asked: Mapping[str, Any]) -> list[Finding]:
    """Names on the hub can be had: it answers, or offline mode is set and the cache has them."""
    names, absent = asked["ids"], [name for name in asked["ids"] if name not in asked["cached"]]
    if not names:
        return []
    offline = asked["offline"]
    if offline and absent:
        return [
            Finding(
                "warning",
                "hub",
                f"offline mode is set, and {_some(absent)} is not seen in the cache",
                node,
                "the recipe could not load it",
                "Fetch it on a machine with a network (`hf download`) into the cache that this node reads (HF_HOME).",
            )
        ]
    if offline or asked["answers"]:
        return [ok("hub", f"{'offline mode is set' if offline else 'it answers'}, for {_some(names)}", node)]
    return [
        Finding(
            "error" if absent else "warning",
            "hub",
            f"{asked['endpoint']} does not answer ({asked['reason']}), and the settings name {_some(names)}",
            node,
            "each rank would wait for the hub, and then fail" if absent else "each rank would wait for the hub",
            "Export HF_HUB_OFFLINE=1 where the cache has it; else name a folder, or a sample:NAME.",
        )
    ]


def _usual(found: Mapping[int, Any]) -> int:
    """The first rank that has what most have."""
    values = list(found.values())
    return max(found, key=lambda rank: (values.count(found[rank]), -rank))


def _differing(found: Mapping[int, Any]) -> dict[int, Any]:
    usual = found[_usual(found)]
    return {rank: value for rank, value in found.items() if value != usual}


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
