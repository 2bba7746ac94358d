"""What a GPU computes, and that nothing waits for it: `pytest -m gpu`."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from tests.parity.job import Recording, tiny_bert, tiny_data, tiny_llama, tiny_tokenizer
from tests.recipes.launching import recipe
from tests.unit.test_padding_free import ANSWER_MASK, ANSWERS, IDS, MASK, pair, paired
from toolkit.compute import (
    checkpoint_activations,
    compile_blocks,
    fuse_loss,
    keep_less,
    linear_cross_entropy,
    multiply_in_fp8,
    remove_padding,
)
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import Step, batch_shape
from toolkit.engine import train_step
from toolkit.environment import Launcher
from toolkit.graphs import Graphs
from toolkit.low_bit_optim import LowBitAdamW
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import choose_strategy
from toolkit.tasks import Batch, LanguageModeling
from toolkit.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda", 0)


def single(model: Any, precision: str = "bf16") -> Any:
    world = World(0, 1, 0, 1, GPU, Launcher.read({}))
    shape = batch_shape(24, None, 1)
    options: dict[str, Any] = {"world": world, "precision": Precision(precision), "shape": shape, "max_grad_norm": 1.0}
    strategy = choose_strategy(StrategyConfig(name="single"), **options)
    strategy.setup(model, lambda wrapped: adamw(wrapped, OptimConfig()))
    return strategy


def batches(task: Any, steps: int, size: int = 24) -> list[Step]:
    rows = tiny_data()
    found = []
    for number in range(1, steps + 1):
        start = number % 2 * size
        batch = task.collate(rows[start : start + size], empty=False).pin_memory()
        found.append(Step(number, 0, [batch], size, number * size))
    return found


def train(
    strategy: Any, task: Any, steps: list[Step], graphs: Graphs | None = None, lr: float = 1e-3
) -> list[tuple[float, float]]:
    results = [train_step(strategy, task, step, learning_rate=lr, seed=0, graphs=graphs) for step in steps]
    assert all(result.applied for result in results)
    return [(result.loss, result.grad_norm) for result in results]


def recording() -> Recording:
    task = Recording()
    task.seen.append([])
    return task


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def of_texts(model: Any, dtype: torch.dtype) -> torch.Tensor:
    model = model.to(GPU, dtype)
    logits = model(input_ids=IDS.to(GPU), attention_mask=MASK.to(GPU)).logits.float()
    cross_entropy(logits, torch.arange(len(IDS), device=GPU) % 3).backward()
    return gradient(model)


def of_answers(model: Any, dtype: torch.dtype) -> torch.Tensor:
    model = model.to(GPU, dtype)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": ANSWERS}
    inputs |= {"decoder_attention_mask": ANSWER_MASK}
    logits = model(**{name: value.to(GPU) for name, value in inputs.items()}).logits.float()
    there = ANSWER_MASK.bool()
    cross_entropy(logits[there.to(GPU)], ANSWERS[there].to(GPU)).backward()
    return gradient(model)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "Llama", "Mistral", "Gemma3Text", "GPT2"])
def test_gradients_are_those_of_the_padded_model(family: str, dtype: torch.dtype, bound: float) -> None:
    """Of the padded one in fp32: what bf16 rounds is the same with padding and without."""
    padded, free = pair(family)
    assert remove_padding(free) == ""
    keep_less(free)
    rounded = apart(of_texts(copy.deepcopy(padded), dtype), expected := of_texts(padded, torch.float32))
    assert apart(of_texts(free, dtype), expected) < max(bound, 1.5 * rounded)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_an_encoder_and_its_decoder(family: str, dtype: torch.dtype, bound: float) -> None:
    padded, free = paired(family)
    assert remove_padding(free) == ""
    keep_less(free)
    rounded = apart(of_answers(copy.deepcopy(padded), dtype), expected := of_answers(padded, torch.float32))
    assert apart(of_answers(free, dtype), expected) < max(bound, 1.5 * rounded)


@pytest.mark.parametrize("family", ["Bert", "Mistral"])
def test_a_text_sees_no_other(family: str) -> None:
    _, model = pair(family)
    remove_padding(model)
    model = model.to(GPU, torch.bfloat16)
    others = IDS.clone()
    others[4] = (others[4] * 7) % 497 + 3
    before, after = (model(input_ids=ids.to(GPU), attention_mask=MASK.to(GPU)).logits for ids in (IDS, others))
    assert (before != after).any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_without_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device=GPU, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 64, device=GPU, dtype=dtype, requires_grad=True)
    labels = torch.randint(1000, (300,), device=GPU)
    labels[::3] = -100
    linear_cross_entropy(hidden, weight, labels).backward()
    found = torch.cat([hidden.grad.float().flatten(), weight.grad.float().flatten()])  # type: ignore[union-attr]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").backward()
    expected = torch.cat([tensor.grad.float().flatten() for tensor in exact])  # type: ignore[union-attr]
    assert apart(found, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def no_waiting(strategy: Any, task: Any, batch: Batch) -> None:
    """Forward and backward, in which whatever waits for the GPU is an error."""
    moved = batch.to(GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        strategy.backward(task.loss(strategy.forward(moved.inputs), moved))
        assert strategy.gradient_norm() is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_encoder_waits_for_nothing() -> None:
    model = tiny_bert(dropout=0.1).train()
    assert remove_padding(model) == ""
    strategy, task = single(model), recording()
    for step in batches(task, 2):
        no_waiting(strategy, task, step.micro_batches[0])


def test_a_language_model_waits_for_nothing() -> None:
    model = tiny_llama().train()
    assert remove_padding(model) == ""
    assert fuse_loss(model) == ""
    assert keep_less(model) > 0
    strategy, task = single(model), LanguageModeling(tiny_tokenizer(), vocabulary=100, fused=True)
    rows = tiny_data()[:12]
    columns = {"input_ids": rows["input_ids"], "pieces": [[n] for n in rows["length"]], "bytes": rows["length"]}
    batch = task.collate(columns | {"id": rows["id"]}, empty=False).pin_memory()
    for _ in range(2):
        no_waiting(strategy, task, batch)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_graphs_give_the_numbers_of_kernels(compiled: bool) -> None:
    found = []
    for recorded in (False, True):
        torch._dynamo.reset()
        model = tiny_bert().train()
        assert remove_padding(model) == ""
        if compiled:
            compile_blocks(model, GPU)
        strategy, task = single(model), recording()
        graphs = Graphs(strategy, task) if recorded else None
        found.append(train(strategy, task, batches(task, 8), graphs))
        if graphs is not None:
            assert graphs.shapes == 2
            assert graphs.seconds > 0
    assert found[1] == [pytest.approx(figures, rel=2e-2) for figures in found[0]]
    assert found[1][-1][0] < found[1][0][0]


def test_dropout_in_graphs_is_drawn_anew_and_by_the_seed_of_the_step() -> None:
    def losses(steps: list[int]) -> list[float]:
        model = tiny_bert(dropout=0.3).train()
        assert remove_padding(model) == ""
        strategy, task = single(model), recording()
        graphs = Graphs(strategy, task)
        first = [replace(batches(task, 1)[0], number=number) for number in steps]
        found = [loss for loss, _ in train(strategy, task, first, graphs, lr=1e-12)]
        assert graphs.shapes == 1
        return found

    _, _, one, two, again = losses([1, 2, 3, 4, 3])
    assert one != two
    assert again == pytest.approx(one, rel=1e-6)


def write_texts(folder: Path) -> Path:
    model = folder / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(model)
    tiny_bert(dropout=0.1).save_pretrained(model)
    rows = tiny_data(200)
    lines = ["text,label"]
    for ids, label in zip(rows["input_ids"], rows["label"], strict=True):
        lines.append(" ".join(f"w{i}" for i in ids) + f",c{label}")
    (folder / "texts.csv").write_text("\n".join(lines), encoding="utf-8")
    return model


@pytest.mark.parametrize("options", [[], ["--train.cuda_graphs", "True"]], ids=["kernels", "graphs"])
def test_a_run_goes_on_as_if_it_had_not_stopped(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout on; bit by bit where kernels are launched alone."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    model = write_texts(tmp_path)
    words = ["--model.name", str(model), "--data.name", str(tmp_path / "texts.csv"), "--train.global_batch", "16"]
    words += ["--data.max_length", "32", "--data.deduplicate", "False", *options]

    def run(name: str, steps: int) -> list[dict[str, Any]]:
        target = tmp_path / name
        more = ["--run.dir", str(target), "--train.steps", str(steps), "--checkpoint.allow_change", "train.steps"]
        code, text = recipe([*words, *more, "--optim.schedule", "constant", "--optim.warmup_steps", "0"], str(tmp_path))
        assert code == 0, text
        report = json.loads((target / "report.json").read_text(encoding="utf-8"))
        assert report["peak_bytes"] > 0
        if options:
            assert report["cuda_graphs"]["shapes"] > 0
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["effective"]["device"] == "cuda:0"
        return [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    whole = run("whole", 20)
    run("parts", 12)
    parts = run("parts", 20)
    pairs = [(a["loss"], b["loss"]) for a, b in zip(whole, parts, strict=True)]
    if options:  # what is launched as a graph, and what alone, depends on what came before
        assert all(a == pytest.approx(b, rel=1e-2) for a, b in pairs)
    else:
        assert all(a == b for a, b in pairs)


def test_offloaded_activations_leave_the_gpu() -> None:
    """The same numbers to the bit, and what blocks keep is not there."""
    found, held = [], []
    for kind in ("full", "offload"):
        model = tiny_llama().train()
        assert remove_padding(model) == ""
        checkpoint_activations(model, kind)  # type: ignore[arg-type]
        model = model.to(GPU, torch.bfloat16)
        ids = torch.randint(2, 100, (64, 32), generator=torch.Generator().manual_seed(0)).to(GPU)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].float().square().mean()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        found.append(gradient(model))
    assert torch.equal(*found)
    assert held[1] <= held[0] - 64 * 32 * 32 * 2  # of one block at least, in bf16


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_moments_in_8_bits_and_on_pages(name: str) -> None:
    """Near torch's, and what is given out and taken back is the same to the bit."""
    torch.manual_seed(0)
    start = torch.randn(1024, 256)
    networks = [nn.Linear(256, 1024, bias=False).to(GPU) for _ in range(2)]
    for network in networks:
        network.weight.data.copy_(start)
    ours, theirs = (
        adamw(one, OptimConfig(name=kind, lr=1e-2))  # type: ignore[arg-type]
        for one, kind in zip(networks, (name, "adamw"), strict=True)
    )
    for number in range(10):
        generator = torch.Generator(GPU).manual_seed(number)
        gradients = torch.randn(1024, 256, device=GPU, generator=generator)
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            network.weight.grad = gradients.clone()
            optimizer.step()
    moved = (networks[1].weight.cpu() - start).norm()
    assert float((networks[0].weight - networks[1].weight).norm().cpu() / moved) < 0.05
    assert isinstance(ours, LowBitAdamW)
    state = ours.state[networks[0].weight]
    assert getattr(state["exp_avg"], "is_paged", False) == name.startswith("paged")
    held = {key: tensor.cpu().clone() for key, tensor in state.items()}
    ours.copied(networks[0].weight, 8 if name.endswith("8bit") else 32)
    ours.put_back()
    assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in held.items())


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="has no fp8")
def test_products_in_fp8_are_those_that_are_emulated() -> None:
    pytest.importorskip("torchao")
    results = []
    for device in (GPU, torch.device("cpu")):
        model = tiny_bert().eval()
        multiply_in_fp8(model, device)
        model = model.to(device, torch.bfloat16)
        logits = model(input_ids=IDS.to(device) % 100, attention_mask=MASK.to(device)).logits.float()
        logits.square().sum().backward()
        results.append(torch.cat([logits.detach().flatten().cpu(), gradient(model).cpu()]))
    assert apart(*results) < 4e-2


def test_transformers_knows_no_mask_for_attention_without_padding() -> None:
    """A mask would be looked at by the host, which waits for that."""
    assert "toolkit_padding_free" not in transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
