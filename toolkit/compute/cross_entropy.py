"""The cross-entropy of a language model whose logits are never there as a whole.

The logits of a step are often its largest tensor: a number for each token and word. Here they are computed for some
tokens at a time, and what is kept of them is their loss and the gradients, which are computed at once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.compute.host import on_device, on_host
from toolkit.compute.padding_free import short_texts
from toolkit.errors import ModelError

IGNORED = -100
"""The label of a token that does not count, as in torch and transformers."""
CHUNK, CHUNK_ON_GPU = 2**24, 2**27
"""Logits at a time. Each chunk passes once over the gradient of the weight, so it must have many tokens: these are 128
of the largest vocabularies of today, 1,024 on a GPU, whose products are fast beside its memory; and it is 64 MiB in
fp32, less than that gradient has, or 512 MiB."""
EVEN = 64
"""Tokens of a chunk are a multiple of it."""
PART = 2**21
"""Elements of a gradient at a time, where it is converted: so few that their memory is used again and again."""
FP16_SCALE = 2.0**15
"""What softmax gives to an unlikely word is too small for fp16; scaled by this, the largest error still fits."""
TOLERANCE = 1e-3
"""Largest difference of the fused loss to the plain one, relative: a bf16 head rounds, whatever changes logits after
the head makes the loss another by far."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of `softmax(hidden @ weight.T + bias)`, summed over the labels that count.

    On a GPU it waits for nothing where the host knows the labels (`compute.host`).

    The gradients are computed along with the loss, those alone that are needed; they can be had by `backward` as often
    as the graph is retained, but not be differentiated again. The weight may be another, or away, in `backward`.

    Args:
        hidden: (…, width), in fp32, bf16 or fp16.
        weight: (vocabulary, width), in the same dtype.
        labels: (…) int64; -100 does not count, and costs nothing.
        bias: (vocabulary,).

    Returns:
        A scalar in fp32; 0 with gradients of 0 where no label counts.
    """
    # Not torch's own `linear_cross_entropy` (2.13, with its options), which is as exact in fp32 alone: in bf16 it adds
    # up the loss and the chunks of the weight's gradient in bf16. 2,048 tokens, 32,000 words, width 576, a core (EPYC):
    #               fp32: s    MiB    bf16: s    MiB    the loss is off by    the weight's gradient by
    # torch's own       3.2    158        5.8    332                2.0e-2                      2.7e-3
    # here              2.7    152        1.1    217                2.5e-6                      1.9e-3
    # logits            2.9    746        1.3    750                2.5e-6                      1.6e-3
    counted = (on_host(labels).flatten() != IGNORED).nonzero().squeeze(1)
    size, number = _chunks(len(counted), weight)
    # Chunks of one size, of which there are few: the last one shows the first token again, which does not count twice.
    filled = on_device(torch.cat([counted, counted[:1].expand(number * size - len(counted))]), hidden.device)
    # The types are those of the weight, whatever autocast would make of them.
    chosen = hidden.flatten(0, -2).index_select(0, filled).to(weight.dtype)
    inputs = (chosen, weight, bias, labels.flatten().index_select(0, filled), len(counted), size)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Loss.apply(*inputs, torch.is_grad_enabled())  # type: ignore[no-any-return,no-untyped-call]


def text_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of `softmax(hidden @ weight.T + bias)`, summed over the labels of each text that count.

    For losses that are not linear in these sums: the gradient is unknown until all of them are there, so logits are
    computed again in `backward`, where the weight must be what it was.

    Args:
        hidden: (texts, length, width), in fp32, bf16 or fp16.
        weight: (vocabulary, width), in the same dtype.
        labels: (texts, length) int64; -100 does not count, and costs nothing.
        bias: (vocabulary,).

    Returns:
        (texts,) in fp32; 0 with gradients of 0 for a text in which no label counts.
    """
    text, position = (on_device(at, hidden.device) for at in (on_host(labels) != IGNORED).nonzero(as_tuple=True))
    size, number = _chunks(len(text), weight)
    real, filler = len(text), number * size - len(text)
    text, position = (torch.cat([at, at[:1].expand(filler)]) for at in (text, position))
    counted, wanted = hidden[text, position].to(weight.dtype), labels[text, position]
    wanted[real:] = IGNORED
    sums = hidden.new_zeros(len(labels), dtype=torch.float32) + 0 * hidden.sum()
    with torch.autocast(hidden.device.type, enabled=False):
        for part in map(slice, range(0, len(wanted), size), range(size, len(wanted) + 1, size)):
            losses = checkpoint(_losses, counted[part], weight, bias, wanted[part], use_reentrant=False)
            sums = sums.index_add(0, text[part], losses)
    return sums


def fuse_loss(model: Any, *, each_text: bool = False) -> str:
    """Let a language model return the loss of its labels in the place of logits, if it can.

    Called with `labels` (texts, length), of which `labels[i, t]` is what position t is to predict (nothing is shifted)
    and -100 does not count, `outputs.logits` is the summed loss, (1,) in fp32, and there is no cache. Called without
    it computes logits as before.

    Args:
        model: of transformers, inside of PEFT's wrapper or not, not yet laid over the ranks.
        each_text: the loss is that of each text, (texts,).

    Returns:
        Why the model stays as it was; empty where it now computes its loss.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return f"its output embedding is a {type(head).__name__}" if head is not None else "it has no output embedding"
    fused = None
    try:
        plain = _probe(model, _plain)
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        fused = _Fused(whole, head, each_text=each_text)
        difference = abs(_probe(model, _fused) / plain - 1)
        why = "" if difference <= TOLERANCE else f"its loss would differ by {difference:.1e}: it changes logits"
    except Exception as error:  # what a model raises that wants other inputs, or other logits, is its own affair
        why = f"it does not take a loss for logits: {error}"
    if why and fused:
        fused.leave()
    return why


class _Loss(torch.autograd.Function):
    """All labels count, but for the last few where there are more tokens than `counted`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        counted: int,
        size: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        inputs = (hidden, weight, bias)
        ctx.scale = FP16_SCALE if weight.dtype == torch.float16 else 1.0
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        # All in fp32 until they have been multiplied by what comes from above, so that they are rounded once.
        gradients = [
            torch.zeros(tensor.shape, device=hidden.device, dtype=torch.float32)
            if needed and grad_enabled and tensor is not None
            else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            loss += _add_gradients(inputs, labels[part], part, counted - start, gradients, ctx.scale)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        factor = upstream / ctx.scale
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (
            *(None if gradient is None else _times(gradient, factor, dtype) for gradient, dtype in gradients),
            *(None,) * 4,
        )


def _chunks(tokens: int, weight: torch.Tensor) -> tuple[int, int]:
    """How large chunks of so many tokens are, each with as many logits as there are words, and how many.

    All are alike, and a multiple of `EVEN`, because a CPU prepares for each size that it has not met (`compute.texts`).
    """
    most = max(1, (CHUNK_ON_GPU if weight.is_cuda else CHUNK) // len(weight))
    number = -(-tokens // most)
    if not number:
        return most, 0
    return min(most, -(-tokens // (number * EVEN)) * EVEN), number


def _losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Of tokens, in fp32."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")


def _add_gradients(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    labels: torch.Tensor,
    part: slice,
    counted: int,
    gradients: list[torch.Tensor | None],
    scale: float,
) -> torch.Tensor:
    """The loss of the first `counted` of a part of the tokens; its gradients, times `scale`, join the others."""
    (hidden, weight, bias), (of_hidden, of_weight, of_bias) = inputs, gradients
    at_label = labels[:, None]
    logits = _product(hidden[part], weight.T).float()
    if bias is not None:
        logits += bias
    # In place, for a chunk is large.
    logits -= logits.amax(1, keepdim=True)
    of_labels = logits.gather(1, at_label)
    sums = logits.exp_().sum(1, keepdim=True)
    loss = (sums.log() - of_labels)[:counted].sum()
    if of_hidden is None and of_weight is None and of_bias is None:
        return loss
    errors = logits.div_(sums)  # the gradient of the logits: softmax, less 1 at the label
    errors.scatter_add_(1, at_label, -torch.ones_like(of_labels))
    errors[counted:] = 0
    if scale != 1:
        errors *= scale
    if of_bias is not None:
        of_bias += errors.sum(0)
    errors = errors.to(weight.dtype)
    del logits
    if of_hidden is not None:
        of_hidden[part] = _product(errors, weight)
    if of_weight is not None and weight.dtype == torch.float32:
        of_weight.addmm_(errors.T, hidden[part])
    elif of_weight is not None and weight.is_cuda:
        torch.addmm(of_weight, errors.T, hidden[part], out_dtype=torch.float32, out=of_weight)
    elif of_weight is not None:  # some words at a time: torch adds in two dtypes by way of a copy
        words = max(1, PART // hidden.shape[1])
        for into, of_words in zip(torch.split(of_weight, words), torch.split(errors.T, words), strict=True):
            into += _product(of_words, hidden[part])
    return loss


def _product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """In fp32 where that costs nothing: a GPU adds up in it."""
    if first.dtype != torch.float32 and first.is_cuda:
        return torch.mm(first, second, out_dtype=torch.float32)
    if first.dtype == torch.float16:  # whose sums may overflow, before what comes from above could make them smaller
        return first.float() @ second.float()
    return first @ second


def _times(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another dtype, without a second copy in fp32."""
    if dtype == gradient.dtype:
        return gradient * factor
    result = torch.empty_like(gradient, dtype=dtype)
    for part, into in zip(torch.split(gradient.view(-1), PART), torch.split(result.view(-1), PART), strict=True):
        into.copy_(part * factor)
    return result


class _Head(nn.Linear):
    """An output embedding that is given labels, or not."""

    fused: _Fused

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits (texts, length, vocabulary) of hidden states (texts, length, width); or the loss, (1,) or (texts,)."""
        labels = self.fused.labels
        if labels is None:
            return super().forward(input)
        if labels.shape != input.shape[:-1]:
            shapes = f"labels {tuple(labels.shape)} and hidden states {tuple(input.shape)}"
            raise ModelError(f"{shapes} are not of the same tokens", "Give a label to each token, -100 to ignore it.")
        if self.fused.each_text:
            return text_losses(input, self.weight, labels, self.bias)
        loss = linear_cross_entropy(input, self.weight, labels, self.bias)
        return torch.stack([loss])  # FSDP warns of views, whose hooks an operation in place would drop


class _Fused:
    """The hooks on a model and its head; holds the labels of a forward until its end."""

    def __init__(self, model: Any, head: Any, *, each_text: bool) -> None:
        self.each_text = each_text
        self.labels: torch.Tensor | None = None
        self._caches = "use_cache" in inspect.signature(model.forward).parameters
        self._head = head
        self._hooks = [
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        head.__class__, head.fused = _Head, self

    def leave(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._head.__class__ = nn.Linear
        del self._head.fused

    def _take(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: its labels are the head's, not the model's, which would compute a loss of logits."""
        self.labels = kwargs.get("labels")
        if self.labels is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
        return args, kwargs | ({"use_cache": False} if self._caches else {})

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward, also one that failed: the next may have no labels."""
        labels, self.labels = self.labels, None
        if labels is None or output is None:
            return
        if _logits(output).shape != ((len(labels),) if self.each_text else (1,)):
            raise ModelError(
                "the model has got another output embedding since its loss was fused",
                "Lay adapters over the model first, then fuse.",
            )


def _logits(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return found


@torch.no_grad()
def _probe(model: Any, loss: Any) -> float:
    """The loss of the tokens of three short texts."""
    training = model.training
    model.eval()
    device = model.get_output_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in short_texts(model.config).items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    try:
        return float(loss(model, inputs, labels))
    finally:
        model.train(training)


def _plain(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = _logits(model(**inputs)).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def _fused(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    return _logits(model(**inputs, labels=labels)).sum()
