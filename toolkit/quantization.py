"""Low-bit loading over bitsandbytes: the linear layers of a frozen network in 8 or 4 bits.

The network comes in fp32, and its linear layers are replaced one by one, in place. bitsandbytes is imported when a
quantization is asked for: it takes seconds.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.config import Quantization
from toolkit.errors import ConfigError

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
"""`none` first."""
PACKED = 8
"""4-bit weights that the widest storage, fp32, holds in one number: a layer that does not fill it stays plain, under
every strategy alike."""
OUTLIERS = 6.0
"""Where products are of 8 bits (on GPUs), inputs above this stay in 16 (Dettmers et al. 2022, section 3.2)."""


@dataclass(frozen=True)
class LowBit:
    """How the layers of a base are to be held.

    Attributes:
        name: as asked for; `none` changes nothing.
        storage: the type that 4-bit weights are packed into.
        device: where they are quantized, and stay.
    """

    name: str = "none"
    storage: torch.dtype = torch.uint8
    device: torch.device = torch.device("cpu")

    @property
    def wanted(self) -> bool:
        """Whether anything is to be done."""
        return self.name != "none"


PLAIN = LowBit()


def quantize(model: Any, low_bit: LowBit, *, keep: Collection[str] = ()) -> list[str]:
    """Replace the linear layers of `model` by quantized ones; their names.

    Plain stay: the modules that are to be trained whole (a classifier's head), the output layer of a language model,
    every weight that two modules share (tied embeddings), and what is no linear layer.

    Args:
        model: of transformers, in fp32 on the CPU, not yet laid over the ranks; it is changed.
        low_bit: how.
        keep: names of modules that stay, with all in them.

    Raises:
        ConfigError: there is no such layer.
    """
    if not low_bit.wanted:
        return []
    layers = _to_quantize(model, low_bit.name, keep)
    for name, module in layers.items():
        model.set_submodule(name, _quantized(module, low_bit))
    return list(layers)


@torch.no_grad()
def round_weights(model: Any, quantization: str, *, keep: Collection[str] = ()) -> None:
    """Give the layers that `quantize` would replace the values that they would then compute with; all stays in fp32."""
    for module in _to_quantize(model, quantization, keep).values():
        values = _rounded(module, quantization)
        module.weight.copy_(values.T if isinstance(module, Conv1D) else values)


@torch.no_grad()
def rounding_errors(model: Any, quantization: str, *, keep: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """What `round_weights` would take from each layer that it rounds: its name, and (outputs, inputs) in fp32."""
    for name, module in _to_quantize(model, quantization, keep).items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        yield name, weight.detach() - _rounded(module, quantization)


def describe_quantization(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """For the plan: what is quantized, what it takes, and what is not; empty where nothing is.

    Args:
        model: with its adapter.
        dtype: in which a run holds what is frozen and not quantized.
    """
    layers = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not layers:
        return {}
    kinds = Counter(name.removesuffix(".base_layer").rpartition(".")[2] for name in layers)
    there = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    packed = {f"{name}.weight" for name in layers}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    plain = dict.fromkeys(_kind(name) for name in frozen if _owner(name) not in layers)
    low = sum(weight_bytes(p) for name, p in frozen.items() if name in packed)
    rest = sum(p.numel() * dtype.itemsize for name, p in frozen.items() if name not in packed)
    return {
        "quantization": f"{quantization_of(model)} in {len(layers)} layers ({there})",
        "base": f"{(low + rest) / 2**20:,.1f} MiB: {low / 2**20:,.1f} quantized, {rest / 2**20:,.1f} plain "
        f"({', '.join(plain)})",
    }


def quantization_of(model: nn.Module) -> str:
    """As asked for; `none` where no layer is quantized."""
    for module in model.modules():
        if is_quantized(module):
            state = getattr(module, "quant_state", None)
            return "int8" if state is None else f"{state.quant_type}{'-double' if state.nested else ''}"
    return "none"


def is_quantized(module: nn.Module) -> bool:
    """Whether it is one of the layers that `quantize` makes."""
    return type(module).__module__ == __name__


def weight_bytes(parameter: torch.Tensor) -> int:
    """Of a parameter, with the scales that belong to it."""
    packed: Any = parameter
    scales = [packed.SCB] if getattr(packed, "SCB", None) is not None else []
    if (state := getattr(packed, "quant_state", None)) is not None:
        scales += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(tensor.numel() * tensor.element_size() for tensor in (parameter, *scales))


def checksum(parameter: torch.Tensor) -> float:
    """A number that two different tensors are unlikely to share. Of packed weights, the bytes are added up: seen as
    numbers of the type that they are packed into, some are none."""
    data = parameter.detach()
    if getattr(parameter, "quant_state", None) is not None:
        data = data.contiguous().view(torch.uint8)
    return float(data.double().sum())


def without_low_bits(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict without what quantized layers have of their own: packed weights and their scales."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if is_quantized(module))
    return {name: t for name, t in state.items() if not name.startswith(layers) or name.endswith(".bias")}


def _to_quantize(model: Any, quantization: str, keep: Collection[str]) -> dict[str, Any]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    # Subclasses do more than their forward says, as torch's attention does with its projection's weight.
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and module is not model.get_output_embeddings()
        and uses[id(module.weight)] == 1
        and not any(f"{name}.".startswith(f"{kept}.") for kept in keep)
        and module.weight.numel() % PACKED == 0
    }
    if not layers:
        raise ConfigError(
            f"--quantization {quantization}: this model has no linear layer to quantize",
            "Drop it; what is trained whole, output layers and shared weights stay as they are.",
        )
    return layers


def import_bitsandbytes(key: str = "--quantization") -> Any:
    """bitsandbytes, without what it prints.

    Raises:
        ConfigError: it is not installed, or cannot run here.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"{key} needs bitsandbytes, which cannot be imported: {error}",
            "Install it (`pip install -c constraints.txt -e .`, on Linux), or drop the option.",
        ) from error
    return bitsandbytes


def _rounded(module: Any, quantization: str) -> torch.Tensor:
    """The weight of a plain layer, (outputs, inputs) in fp32, as a quantized one computes with it."""
    functional = import_bitsandbytes().functional
    weight: Any = _quantized(module, LowBit(quantization)).weight
    if quantization == "int8":
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)  # type: ignore[no-any-return]
    return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]


def _quantized(module: Any, low_bit: LowBit) -> nn.Module:
    """A layer of low bits with the weight and bias of a plain one."""
    kinds, modules = _layers(), import_bitsandbytes().nn
    weight = module.weight.detach()
    if isinstance(module, Conv1D):  # GPT-2's linear layer, whose weight lies across
        weight = weight.T.contiguous()
    outputs, inputs = weight.shape
    plain: dict[str, Any] = {"bias": module.bias is not None, "device": "meta"}
    layer: Any
    if low_bit.name == "int8":
        layer = kinds["int8"](inputs, outputs, has_fp16_weights=False, threshold=OUTLIERS, **plain)
        parameter = modules.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind, _, double = low_bit.name.partition("-")
        packing = {"quant_type": kind, "compress_statistics": bool(double), "quant_storage": low_bit.storage}
        layer = kinds["4bit"](inputs, outputs, **packing, **plain)
        parameter = modules.Params4bit(weight, requires_grad=False, module=layer, **packing)
    layer.weight, layer.bias = parameter.to(low_bit.device), module.bias
    layer.train(module.training)
    return layer  # type: ignore[no-any-return]


@functools.cache
def _layers() -> dict[str, type[nn.Module]]:
    """bitsandbytes' layers, which compute in the type of what comes in, with three things that they do left out.

    Theirs round the frozen bias to the type of the input, in place. Once evaluated on a CPU with AVX512-BF16, their
    4-bit layer packs its weights anew, and gives no gradient after that. And their 8-bit layer computes with rounded
    inputs when it is evaluated on a CPU, but not when it is trained there.
    """
    bitsandbytes = import_bitsandbytes()
    four: Any = bitsandbytes.nn.Linear4bit
    eight: Any = bitsandbytes.nn.Linear8bitLt

    class Linear4bit(four):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Parameters that were laid over ranks have lost what belongs to them; PEFT reads it there.
            bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module(self)
            x = x.to(_result_type(x))
            bias = None if self.bias is None else self.bias.to(x.dtype)
            state = self.weight.quant_state
            product: torch.Tensor = bitsandbytes.matmul_4bit(x, self.weight, bias=bias, quant_state=state)
            return product

    class Linear8bitLt(eight):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.SCB is not None:  # PEFT's DoRA leaves a copy that has lost them
                self.init_8bit_state()
            self.state.is_training = True
            x = x.to(_result_type(x))
            bias = None if self.bias is None else self.bias.to(x.dtype)
            product: torch.Tensor = bitsandbytes.matmul(x, self.weight, bias=bias, state=self.state)
            return product

    return {"4bit": Linear4bit, "int8": Linear8bitLt}


def _result_type(x: torch.Tensor) -> torch.dtype:
    """Of a plain linear layer: autocast (which the probe computes under) has a say in it."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _kind(name: str) -> str:
    """Of a parameter: the last part of its owner's name."""
    return _owner(name).removesuffix(".original_module").rpartition(".")[2]  # PEFT's, of what is trained whole


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
