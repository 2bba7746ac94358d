"""The folder of an adapter, as plain PEFT loads it onto its base, and the proof that it is what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from toolkit.adapters import WEIGHTS, adapter_of, adapter_state, left_out, load_adapted, rebuild, save_adapter
from toolkit.checkpoint.export import (
    BOUND,
    Proof,
    load_tokenizer,
    logit_difference,
    probe_batch,
    quiet_libraries,
    write_config,
)
from toolkit.errors import CheckpointError
from toolkit.folders import Guard, unguarded, written_aside


def export_adapter(
    base: Path, weights: Mapping[str, torch.Tensor], target: Path, bound: float = BOUND, guard: Guard = unguarded
) -> Proof:
    """Write and prove the folder of an adapter; it takes the place of `target` when it is proved.

    The base is loaded again and compared with the one that the run began with. The adapter on it, with the trained
    weights by their names, must answer as the folder does once PEFT has loaded it onto a base of its own.

    Args:
        base: holds the run's configuration of the model, its tokenizer, and which adapter on which base it trains.
        weights: whole, by the names of the model with its adapter; of what is frozen none is needed.
        target: where to.
        bound: on the difference of the logits.
        guard: as for `written_aside`.

    Raises:
        ModelError: the base is not there any more, or is another one.
        CheckpointError: the weights are not those of the adapter, or the proof failed.
    """
    tokenizer = load_tokenizer(base)
    with quiet_libraries():
        model = rebuild(base).eval()
        _fill(model, weights, base)
        adapter = adapter_of(model)
        assert adapter is not None
        with written_aside(target, guard) as aside:
            write_config(model, aside, torch.float32)
            tokenizer.save_pretrained(aside)
            adapter.write(aside)
            save_adapter(model, aside)
            again = load_adapted(aside)
            tensors, loaded = load_file(aside / WEIGHTS), adapter_state(again)
            differences = [(loaded[name] - tensor).abs().max() for name, tensor in tensors.items()]
            weights_apart = float(torch.stack(differences).max())
            logits = logit_difference(model, again, probe_batch(model.config))
            # A difference that is not a number is no small one.
            if not (weights_apart <= bound and logits <= bound):
                raise CheckpointError(
                    f"the adapter that was written is not the one that was trained: its weights differ by up to "
                    f"{weights_apart:.3g}, its logits by up to {logits:.3g}, and the bound is {bound:g}",
                    "Nothing was kept of it. Where other kernels explain so small a difference, set a higher bound.",
                )
            size = (aside / WEIGHTS).stat().st_size
    return Proof(len(tensors), sum(t.numel() for t in tensors.values()), 1, size, weights_apart, logits, bound)


def _fill(model: Any, weights: Mapping[str, torch.Tensor], base: Path) -> None:
    own, out = model.state_dict(), left_out(model)
    needed = {name for name, _ in model.named_parameters()} - out
    given = {name: tensor for name, tensor in weights.items() if name not in out}
    strange = [name for name in given if name not in own or own[name].shape != given[name].shape]
    lacking = sorted(needed - given.keys())
    if strange or lacking:
        raise CheckpointError(
            f"the weights are not those of the adapter in {base}: {len(strange)} do not fit "
            f"({', '.join(strange[:3]) or 'none'}), {len(lacking)} are missing ({', '.join(lacking[:3]) or 'none'})",
            "Take base/ and checkpoint from the same run.",
        )
    model.load_state_dict(given, strict=False)
