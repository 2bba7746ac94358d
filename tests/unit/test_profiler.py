"""The parts of a step: from events to seconds, from seconds to a sentence."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.profiler import refuse_in_vain, span
from toolkit.profiler.parts import (
    CHECKPOINT,
    COMMUNICATION,
    COMPUTE,
    DATA,
    HOST,
    PADDING,
    PARTS,
    WAITING,
    Event,
    RankTimes,
    all_ranks,
    is_collective,
    is_operator,
    rank_times,
    union,
)
from toolkit.profiler.table import advice, table
from toolkit.profiler.tracer import padding_share

NAMES = {
    # As they stand in traces of 2 gloo ranks under ddp, fsdp, zero2 and zero3.
    ("aten::addmm", "cpu_op"): "operator",
    ("fsdp::chunk_cat", "cpu_op"): "operator",
    ("torch::distributed::reducer::mul_out", "cpu_op"): "operator",
    ("c10d::allreduce_", "cpu_op"): "collective",
    ("c10d::_allgather_base_", "cpu_op"): "collective",
    ("_c10d_functional::wait_tensor", "cpu_op"): "collective",
    ("gloo:all_reduce", "user_annotation"): "collective",
    ("gloo:all_gather", "user_annotation"): "collective",
    ("autograd::engine::evaluate_function: AddmmBackward0", "cpu_op"): "around",
    ("AddmmBackward0", "cpu_op"): "around",
    ("PythonSubclass", "cpu_op"): "around",
    ("FSDP::post_backward_reduce", "user_annotation"): "around",
    ("DistributedDataParallel.forward", "user_annotation"): "around",
    ("Optimizer.step#AdamW.step", "user_annotation"): "around",
    ("toolkit::forward", "user_annotation"): "around",
    # And of a GPU.
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel"): "collective",
    ("sm90_xmma_gemm_f32", "kernel"): "around",
}


@pytest.mark.parametrize(("name", "category"), NAMES)
def test_names(name: str, category: str) -> None:
    event = Event(name, category, "1", 0, 1)
    # A collective is looked for first: those of c10d are operators of torch, too.
    found = "collective" if is_collective(event) else "operator" if is_operator(event) else "around"
    assert found == NAMES[name, category]


def on_cpu(name: str, start: float, end: float, thread: str = "main") -> Event:
    category = "cpu_op" if name.startswith(("aten", "c10d", "autograd")) else "user_annotation"
    return Event(name, category, thread, start, end)


STEP = [
    on_cpu("toolkit::step", 0, 100),
    on_cpu("toolkit::data", 0, 10),
    on_cpu("aten::tensor", 2, 5),  # collating is no computing
    on_cpu("toolkit::forward", 12, 30),
    on_cpu("aten::linear", 14, 24),
    on_cpu("aten::addmm", 15, 23),
    on_cpu("toolkit::backward", 30, 70),
    on_cpu("autograd::engine::evaluate_function", 31, 50),
    on_cpu("aten::mm", 32, 48),
    on_cpu("c10d::allreduce_", 50, 51),
    on_cpu("gloo:all_reduce", 40, 66, thread="other"),  # 8 of it behind aten::mm, 16 are waited for
    on_cpu("toolkit::update", 70, 80),
    on_cpu("aten::_fused_adamw_", 71, 79),
    on_cpu("toolkit::checkpoint", 80, 90),
    on_cpu("aten::copy_", 81, 89),
    on_cpu("toolkit::log", 90, 95),
    on_cpu("aten::add", 91, 92),
    on_cpu("aten::mm", 200, 300),  # outside of steps
]


def test_every_instant_has_one_part() -> None:
    times = rank_times(STEP)
    assert times.wall == 100
    assert times.parts == {
        COMPUTE: 10 + 16 + 8,
        COMMUNICATION: (50 - 48) + 1 + (66 - 51),
        DATA: 10,
        CHECKPOINT: 10,
        HOST: 100 - 34 - 18 - 10 - 10,
        PADDING: 0,
        WAITING: 0,
    }
    assert times.trained == 26
    assert times.hidden == 8
    assert sum(times.exposed[0]) == 18


def test_on_a_gpu_what_runs_there_decides() -> None:
    kernels = [
        Event("gemm", "kernel", "stream 7", 16, 40),
        Event("ncclDevKernel_AllReduce", "kernel", "stream 8", 30, 60),
        Event("adamw", "kernel", "stream 7", 72, 76),
        Event("toolkit::update", "gpu_user_annotation", "stream 7", 72, 76),
    ]
    times = rank_times([event for event in STEP if not event.name.startswith("gloo")] + kernels)
    assert times.parts[COMPUTE] == 24 + 4
    assert times.trained == 24
    assert times.parts[COMMUNICATION] == 20
    assert times.hidden == 10
    assert times.parts[DATA] == times.parts[CHECKPOINT] == 10
    assert sum(times.parts.values()) == times.wall == 100


def test_events_that_end_past_their_parent_are_not_counted_twice() -> None:
    events = [on_cpu("toolkit::step", 0, 10), on_cpu("toolkit::forward", 1, 5), on_cpu("aten::mm", 2, 5.5)]
    times = rank_times(events)
    assert sum(times.parts.values()) == pytest.approx(10)
    assert times.parts[COMPUTE] == pytest.approx(3.5)


def test_what_computes_without_torch_says_so() -> None:
    forward, numpy = on_cpu("toolkit::forward", 1, 5), on_cpu("toolkit::compute", 2, 4)
    assert rank_times([on_cpu("toolkit::step", 0, 10), forward, numpy]).parts[COMPUTE] == 2


def test_a_trace_without_a_step() -> None:
    assert rank_times([on_cpu("aten::mm", 0, 1)]) == RankTimes()


def test_who_waits_for_whom() -> None:
    """In the first cell the second rank is late, in the next the first one: both wait, and for one another."""
    ranks = [
        RankTimes(wall=10, parts={COMMUNICATION: 5, COMPUTE: 5}, exposed=[[4.0, 0.0, 1.0]]),
        RankTimes(wall=10, parts={COMMUNICATION: 4, COMPUTE: 6}, exposed=[[1.0, 0.0, 3.0]]),
    ]
    first, second = all_ranks(ranks)
    assert (first[WAITING], first[COMMUNICATION]) == (3, 2)
    assert (second[WAITING], second[COMMUNICATION]) == (2, 2)
    assert sum(first.values()) == sum(second.values()) == 10


def test_ranks_with_unlike_spans_are_compared_by_steps() -> None:
    ranks = [
        RankTimes(wall=10, parts={COMMUNICATION: 5}, exposed=[[4.0, 1.0], [0.0]]),
        RankTimes(wall=10, parts={COMMUNICATION: 4}, exposed=[[1.0], [3.0]]),
    ]
    assert [parts[WAITING] for parts in all_ranks(ranks)] == [4, 3]


def test_padding_is_taken_out_of_forward_and_backward() -> None:
    (parts,) = all_ranks([RankTimes(wall=10, parts={COMPUTE: 10}, trained=8, exposed=[[]], padding=0.25)])
    assert parts[PADDING] == 2
    assert parts[COMPUTE] == 8


def test_union() -> None:
    assert union([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]


def batch(mask: list[list[int]], weights: list[float]) -> SimpleNamespace:
    return SimpleNamespace(inputs={"attention_mask": torch.tensor(mask)}, weights=torch.tensor(weights))


def test_share_of_padding() -> None:
    full, filler = batch([[1, 1, 1, 1], [1, 1, 0, 0]], [1, 1]), batch([[1, 1]], [0])
    assert padding_share([full], padding_free=False) == pytest.approx(2 / 8)
    assert padding_share([full], padding_free=True) == 0
    assert padding_share([full, filler], padding_free=True) == pytest.approx(2 / 8)
    assert padding_share([full, filler], padding_free=False) == pytest.approx(4 / 10)
    assert padding_share([], padding_free=False) == 0


def shares(**parts: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | {COMPUTE: 1 - sum(parts.values())} | parts


def test_the_sentence_names_the_largest_part_and_the_setting() -> None:
    assert advice(shares(data=0.31, host=0.1)) == "Waiting for data takes 31 % of a step: raise --data.workers."
    assert "--train.micro_batch" in advice(shares(host=0.4, data=0.2))
    assert "--checkpoint.every" in advice(shares(checkpoint=0.2))
    assert "--train.padding_free at auto" in advice(shares(padding=0.2), padding="off")
    assert "--train.micro_batch" in advice(shares(padding=0.2))
    assert "filler" in advice(shares(padding=0.2), padding_free=True)
    assert "--train.global_batch" in advice(shares(communication=0.2))
    assert "--strategy.name ddp" not in advice(shares(communication=0.2))
    assert "--strategy.name ddp" in advice(shares(communication=0.2), sharded=True)
    assert "rank 3" in advice(shares(waiting=0.2), last=3)
    assert "--data.workers" in advice(shares(waiting=0.2), last=3, last_is_late_for_data=True)
    assert advice(shares(data=0.04)) == "Computing takes 96 % of a step: nothing else is worth a change."


def test_the_table_adds_up() -> None:
    ranks = [
        RankTimes(wall=10, parts={COMPUTE: 2, DATA: 6, COMMUNICATION: 2}, trained=2, exposed=[[1.0], [1.0]]),
        RankTimes(wall=10, parts={COMPUTE: 2, COMMUNICATION: 8}, trained=2, exposed=[[4.0], [4.0]], padding=0.5),
    ]
    found = table(ranks, all_ranks(ranks), {"padding_free": False, "padding": "auto", "sharded": False})
    assert (found["steps"], found["ranks"], found["seconds"]) == (2, 2, 5)
    rows = {row["part"]: row for row in found["parts"]}
    assert sum(row["seconds"] for row in found["parts"]) == pytest.approx(5)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1)
    assert (rows[DATA]["seconds"], rows[DATA]["least"], rows[DATA]["most"]) == (1.5, 0, 3)
    assert (rows[WAITING]["seconds"], rows[WAITING]["most"]) == (1.5, 3)
    assert found["padding_of_tokens"] == 0.25
    # Data and waiting are equal here; waiting comes first, and it is for rank 0, which waits for data.
    assert found["advice"].startswith("Waiting for other ranks takes 30 %")
    assert "rank 0" in found["advice"]
    assert "--data.workers" in found["advice"]


def test_a_run_that_is_too_short_is_refused() -> None:
    refuse_in_vain(None, 1)
    refuse_in_vain(1, 4)
    with pytest.raises(ConfigError, match="--run.profile 5"):
        refuse_in_vain(5, 3)


def test_a_span_is_nothing_where_no_trace_is_taken() -> None:
    assert span("forward") is span("backward")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, span("forward"):
        pass
    assert "toolkit::forward" in {event.name for event in profile.events()}


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch, toolkit.world; before = set(sys.modules); import toolkit.profiler; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'toolkit'} "
        "- set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
