"""AdamW over bitsandbytes: moments in 8 bits, and moments on pages that a GPU lends to the host's memory.

Moments in 8 bits are kept in blocks of 256 numbers, each block with its largest magnitude and, for each number, its
place in a table of 256 values (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", section 2).
bitsandbytes' own optimizers know no DTensors and no checkpoints that another strategy reads, so that only its kernels
are used: a parameter's local part goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from toolkit.quantization import import_bitsandbytes

SMALLEST = 4096
"""Elements of a parameter from which on its moments are worth 8 bits."""
_BLOCK = 256
_PAGED = 100_000
"""Elements from which on a moment is worth pages."""


class LowBitAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, as torch's, in less memory of the device.

    What it holds of a parameter is given out as copies in fp32 (`copied`), which may be changed and taken back
    (`put_back`): to and fro nothing is lost, for what has been rounded once is rounded to itself.

    Args:
        groups: as of torch's AdamW, each with its `bits`, 8 or 32.
        lr, betas, eps: as of torch's AdamW.
        paged: let large moments lie on pages that move between a GPU and the host, as the GPU needs room.
    """

    tables: ClassVar[dict[str, torch.Tensor]] = {}
    """Of each moment, the 256 values that it is rounded to, over the largest magnitude of its block."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, paged: bool
    ) -> None:
        self._kernels = import_bitsandbytes("--optim.name").functional
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "bits": 32})
        self._paged = paged
        self._copies: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        if not self.tables:
            signed = self._kernels.create_dynamic_map(signed=True)
            signed[0] = -1.0  # as its last is 1: a block whose largest magnitude is negative is rounded to itself too
            self.tables.update(exp_avg=signed, exp_avg_sq=self._kernels.create_dynamic_map(signed=False))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        assert closure is None
        self._copies.clear()
        for group in self.param_groups:
            (beta1, beta2), eps, decay, rate = group["betas"], group["eps"], group["weight_decay"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weights, gradient = _local(parameter), _local(parameter.grad).contiguous()
                state = self._state_of(parameter, group["bits"])
                state["step"] += 1
                if not weights.numel():  # a rank with no row of it
                    continue
                first, second, count = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
                for moment in (first, second):
                    if getattr(moment, "is_paged", False):
                        self._kernels.prefetch_tensor(moment)
                if group["bits"] == 8:
                    tables = [self._table(moment, weights.device) for moment in ("exp_avg", "exp_avg_sq")]
                    self._kernels.optimizer_update_8bit_blockwise(
                        *("adam", gradient, weights, first, second, beta1, beta2, 0.0, 0.0, eps, count, rate),
                        *(*tables, state["exp_avg_largest"], state["exp_avg_sq_largest"], decay),
                    )
                else:
                    self._kernels.optimizer_update_32bit(
                        *("adam", gradient, weights, first, beta1, eps, count, rate, second, beta2, 0.0, 0.0, decay),
                    )
        if self._paged and torch.cuda.is_available():
            torch.cuda.synchronize()  # the host may touch pages only when the GPU has let go of them

    def copied(self, parameter: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`step`, in place, and the moments of this rank's part of `parameter`: copies, 1-D, fp32, on the CPU.

        They are the same ones until the next step, or until they are put back. `bits` are those of its group.
        """
        state = self._state_of(parameter, bits)
        if parameter not in self._copies:
            self._copies[parameter] = {moment: self._read(state, moment) for moment in self.tables}
        return {"step": state["step"], **self._copies[parameter]}

    @torch.no_grad()
    def put_back(self) -> None:
        """Take back what `copied` gave."""
        for parameter, copies in self._copies.items():
            for moment, values in copies.items():
                self._write(self.state[parameter], moment, values)
        self._copies.clear()

    def state_bytes(self) -> int:
        """That the moments take on this rank."""
        tensors = (t for state in self.state.values() for name, t in state.items() if name != "step")
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _state_of(self, parameter: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            local = _local(parameter)
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU, where it is read
            for moment in self.tables:
                state[moment] = self._zeros(local, torch.uint8 if bits == 8 else torch.float32)
                if bits == 8:
                    blocks = -(-local.numel() // _BLOCK)
                    state[f"{moment}_largest"] = torch.zeros(blocks, dtype=torch.float32, device=local.device)
        return state

    def _zeros(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self._paged or like.device.type == "cpu" or like.numel() < _PAGED:
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
        pages: torch.Tensor = self._kernels.get_paged(*like.shape, dtype=dtype, device=like.device)
        self._kernels.fill(pages, 0)
        return pages

    def _read(self, state: dict[str, torch.Tensor], moment: str) -> torch.Tensor:
        held = state[moment]
        if held.dtype == torch.float32:
            return held.detach().flatten().cpu().clone()
        largest, table = state[f"{moment}_largest"].to(held.device), self._table(moment, held.device)
        if not held.numel():
            return torch.zeros(0)
        values: torch.Tensor = self._kernels.dequantize_blockwise(held, absmax=largest, code=table, blocksize=_BLOCK)
        return values.flatten().cpu()

    def _write(self, state: dict[str, torch.Tensor], moment: str, values: torch.Tensor) -> None:
        held = state[moment]
        values = values.view(held.shape).to(held.device)
        if held.dtype == torch.float32:
            held.copy_(values)
        elif held.numel():
            codes, largest = _rounded(values.flatten(), self._table(moment, held.device))
            held.copy_(codes.view(held.shape))
            state[f"{moment}_largest"].copy_(largest)

    def _table(self, moment: str, device: torch.device) -> torch.Tensor:
        if self.tables[moment].device != device:
            self.tables[moment] = self.tables[moment].to(device)
        return self.tables[moment]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rounded(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the table (elements,) and largest magnitudes (blocks,) of 1-D values.

    Not by bitsandbytes, whose kernel for CPUs looks small values up in a coarser table, so that some of those that it
    has rounded itself would move on.
    """
    blocks = nn.functional.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1)
    shares = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    between = (table[1:] + table[:-1]) / 2
    return torch.bucketize(shares, between, out_int32=True).flatten()[: len(values)].to(torch.uint8), largest
