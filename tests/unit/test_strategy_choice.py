"""Which strategy is taken, and that no setting of one is without effect in silence."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.job import Recording, tiny_bert, tiny_data
from tests.ranks import on_ranks
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import BatchShape, Loader, batch_shape
from toolkit.engine import train_step
from toolkit.errors import ConfigError, LaunchError
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import STRATEGIES, Strategy, choose_strategy
from toolkit.world import World, world

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
ON_CPU = {"offload"}  # what a strategy reads, but only on GPUs
BESIDE = {"compress_rank", "compress_start"}  # what a strategy reads, but only beside another option


def ranks(size: int, launcher: dict[str, str] | None = None, *, nodes: int = 1, device: str = "cpu") -> World:
    """Rank 0 of a world that nobody has connected."""
    environment = {"ACCELERATE_USE_CPU": "true"} | (launcher or {})
    if size > 1:
        numbers = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(size // nodes)}
        environment |= numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return dataclasses.replace(world(environment), device=torch.device(device))


def choose(
    size: int,
    launcher: dict[str, str] | None = None,
    *,
    nodes: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    max_grad_norm: float | None = 1.0,
    micro_batch: int | None = None,
    **options: Any,
) -> Strategy:
    return choose_strategy(
        StrategyConfig(**options),
        world=ranks(size, launcher, nodes=nodes, device=device),
        precision=Precision(precision),
        shape=batch_shape(24, micro_batch, size),
        max_grad_norm=max_grad_norm,
    )


def refusal(*arguments: Any, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        choose(*arguments, **options)
    assert caught.value.remedy
    return caught.value


@pytest.fixture
def deepspeed(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a DeepSpeed JSON."""

    def write(content: Any) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


# Command line and launcher.


@pytest.mark.parametrize(
    ("size", "launcher", "asked", "taken"),
    [
        (1, {}, "auto", "single"),
        (2, {}, "auto", "ddp"),
        (1, {}, "single", "single"),
        *((2, {}, name, name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        (2, FSDP, "auto", "fsdp"),
        (2, FSDP2, "auto", "fsdp"),
        (2, FSDP, "fsdp", "fsdp"),
        (2, ZERO, "auto", "zero2"),
        *((2, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}, "auto", f"zero{stage}") for stage in "123"),
        (2, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3", "zero3"),
    ],
)
def test_strategy_taken(size: int, launcher: dict[str, str], asked: str, taken: str) -> None:
    strategy = choose(size, launcher, name=asked)
    assert (strategy.name, type(strategy)) == (taken, STRATEGIES[taken])


@pytest.mark.parametrize(
    ("launcher", "asked", "wish"),
    [
        *((FSDP, name, "fsdp") for name in STRATEGIES if name != "fsdp"),
        *((ZERO, name, "zero2") for name in STRATEGIES if name != "zero2"),
    ],
)
def test_contradiction_names_both(launcher: dict[str, str], asked: str, wish: str) -> None:
    error = refusal(2, launcher, name=asked)
    assert error.message == f"--strategy.name {asked} contradicts the launcher, which asks for {wish}"
    assert error.remedy == "Drop one of the two."


def test_every_strategy_is_tested_here() -> None:
    assert set(STRATEGIES) == {"single", "ddp", "diloco", "fsdp", "zero1", "zero2", "zero3"}


# A strategy and the number of processes.


@pytest.mark.parametrize("name", ["ddp", "diloco", "fsdp", "zero1", "zero2", "zero3"])
def test_strategies_that_need_company(name: str) -> None:
    error = refusal(1, name=name)
    assert f"strategy {name} has no effect on one process" in error.message
    assert "configs/accelerate/cpu2.yaml" in error.remedy
    assert "--strategy.name single" in error.remedy


@pytest.mark.parametrize(("launcher", "name"), [(FSDP, "fsdp"), (FSDP2, "fsdp"), (ZERO, "zero2")])
def test_launchers_wish_on_one_process(launcher: dict[str, str], name: str) -> None:
    assert f"strategy {name} has no effect on one process" in refusal(1, launcher).message


def test_single_on_several_processes() -> None:
    error = refusal(3, name="single")
    assert error.message == "--strategy.name single on 3 processes would train 3 separate models"


@pytest.mark.parametrize(("name", "offload"), [("fsdp", "parameters"), ("zero2", "optimizer"), ("zero3", "parameters")])
def test_one_gpu_may_offload(name: str, offload: str) -> None:
    assert choose(1, device="cuda", name=name, offload=offload).name == name


# Options that a strategy does not read.

OPTIONS: dict[str, Any] = {
    "reshard_after_forward": False,
    "shard_size": 2,
    "wrap": ("BertLayer",),
    "offload": "parameters",
    "deepspeed": Path("ds.json"),
    "compress": "bf16",
    "compress_rank": 2,
    "compress_start": 5,
    "local_steps": 4,
    "outer_lr": 0.5,
    "outer_momentum": 0.5,
}


def test_every_option_is_tested_here() -> None:
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(StrategyConfig)} - {"name"}
    for name, kind in STRATEGIES.items():
        assert kind.options <= set(OPTIONS), name


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_options_of_another_strategy(name: str, option: str) -> None:
    size = 1 if name == "single" else 4
    if option in STRATEGIES[name].options - ON_CPU - BESIDE and option != "deepspeed":
        assert getattr(choose(size, name=name, **{option: OPTIONS[option]}).config, option) == OPTIONS[option]
        return
    message = refusal(size, name=name, **{option: OPTIONS[option]}).message
    assert f"--strategy.{option}" in message
    if option not in STRATEGIES[name].options:
        assert message == f"--strategy.{option} has no effect under strategy {name}"


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_offload_on_cpu_ranks(name: str, offload: str) -> None:
    message = f"--strategy.offload {offload} has no effect on CPU ranks"
    assert refusal(2, name=name, offload=offload).message.startswith(message)
    assert choose(2, name=name, offload="none").config.offload == "none"


def test_offload_that_a_strategy_cannot_do() -> None:
    message = "--strategy.offload optimizer has no effect under fsdp"
    assert refusal(2, device="cuda", name="fsdp", offload="optimizer").message.startswith(message)
    for stage in "12":
        message = f"--strategy.offload parameters has no effect under zero{stage}"
        assert refusal(2, device="cuda", name=f"zero{stage}", offload="parameters").message.startswith(message)


@pytest.mark.parametrize(("size", "shard_size"), [(4, 3), (4, 4), (2, 2), (4, 8), (6, 4)])
def test_shards_that_do_not_divide(size: int, shard_size: int) -> None:
    error = refusal(size, name="fsdp", shard_size=shard_size)
    assert error.message == f"--strategy.shard_size {shard_size} does not make hybrid shards of {size} ranks"


def test_fp16_under_zero_on_this_cpu() -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert choose(2, name="zero2", precision="fp16").precision.name == "fp16"
    else:
        assert refused_fp16() == "zero3"
    for name in ("ddp", "fsdp"):
        assert choose(2, name=name, precision="fp16").precision.name == "fp16"


def refused_fp16() -> str:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # read when first asked
    error = refusal(2, name="zero3", precision="fp16")
    assert "--precision fp16: DeepSpeed (zero3) does not run fp16 on a CPU" in error.message
    return "zero3"


def test_fp16_under_zero_on_a_cpu_without_it() -> None:
    assert on_ranks(refused_fp16, 1) == ["zero3"]


# Compressed gradients.


@pytest.mark.parametrize("option", sorted(BESIDE))
def test_what_only_powersgd_reads(option: str) -> None:
    for compress in ("none", "bf16"):
        message = refusal(2, name="ddp", compress=compress, **{option: 3}).message
        assert message == f"--strategy.{option} has no effect with --strategy.compress {compress}"
    assert getattr(choose(2, name="ddp", compress="powersgd", **{option: 3}).config, option) == 3


def test_powersgd_under_fp16() -> None:
    message = "--strategy.compress powersgd does not work with --precision fp16"
    assert refusal(2, name="ddp", compress="powersgd", precision="fp16").message.startswith(message)
    assert choose(2, name="ddp", compress="bf16", precision="fp16").config.compress == "bf16"


# What the launcher asks of FSDP.


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        (FSDP, {}),
        (FSDP2, {}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "1"}, {}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "2"}, {"reshard_after_forward": False}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"shard_size": 2}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "hybrid_shard_zero2"}, {"shard_size": 2, "reshard_after_forward": False}),
        # What the questionnaire of `accelerate config` writes for FSDP1.
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "full_shard"}, {}),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"}, {"reshard_after_forward": False}),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "hybrid_shard"}, {"shard_size": 2}),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"reshard_after_forward": False}),
        (FSDP2 | {"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, {}),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {"offload": "parameters"}),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "false"}, {}),
        (FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer, T5Block"}, {"wrap": ("BertLayer", "T5Block")}),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, {}),
    ],
)
def test_fsdp_of_the_launcher(launcher: dict[str, str], options: dict[str, Any]) -> None:
    strategy = choose(4, launcher, nodes=2, device="cuda")
    assert strategy.config == StrategyConfig(name="fsdp", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "--fsdp_sharding_strategy NO_SHARD"),
        ({"FSDP_SHARDING_STRATEGY": "3"}, "--fsdp_sharding_strategy NO_SHARD"),
        ({"FSDP_SHARDING_STRATEGY": "SHARDS"}, "--fsdp_sharding_strategy SHARDS"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "no_shard"}, "--fsdp_reshard_after_forward no_shard"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "--fsdp_reshard_after_forward false"),
        (
            {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"},
            "--fsdp_sharding_strategy HYBRID_SHARD and --fsdp_reshard_after_forward shard_grad_op",
        ),
        ({"FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "--fsdp_version 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP"),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "FSDP_AUTO_WRAP_POLICY=NO_WRAP"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP_ACTIVATION_CHECKPOINTING=true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true"),
        ({"FSDP_FORWARD_PREFETCH": "true"}, "FSDP_FORWARD_PREFETCH=true"),
        ({"FSDP_IGNORED_MODULES": "bert.pooler"}, "--fsdp_ignored_modules"),
    ],
)
def test_fsdp_of_the_launcher_that_has_no_effect(change: dict[str, str], message: str) -> None:
    error = refusal(4, FSDP | change, nodes=2)
    assert "the launcher asks for" in error.message
    assert message in error.message


def test_hybrid_shards_of_the_launcher_on_one_node() -> None:
    error = refusal(4, FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"})
    assert "--fsdp_sharding_strategy HYBRID_SHARD replicates over nodes, and there is one" in error.message


def test_options_of_command_line_and_launcher_together() -> None:
    strategy = choose(4, FSDP2, reshard_after_forward=False, shard_size=2)
    assert strategy.config == StrategyConfig(name="fsdp", reshard_after_forward=False, shard_size=2)
    wrap = FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}
    assert choose(2, wrap, wrap=("BertLayer",)).config.wrap == ("BertLayer",)
    for launcher, options, message in (
        (wrap, {"wrap": ("T5Block",)}, "--strategy.wrap ('T5Block',) contradicts the launcher"),
        (
            FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
            {"reshard_after_forward": True},
            "--strategy.reshard_after_forward True contradicts the launcher, which asks for False",
        ),
        (
            FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"},
            {"offload": "none"},
            "--strategy.offload none contradicts the launcher, which asks for parameters",
        ),
    ):
        assert message in refusal(2, launcher, device="cuda", **options).message


# What the launcher asks of DeepSpeed.


@pytest.mark.parametrize(
    ("change", "offload"),
    [
        ({}, None),
        ({"OPTIMIZER": "none", "PARAM": "none"}, None),
        ({"OPTIMIZER": "cpu", "PARAM": "none"}, "optimizer"),
        ({"OPTIMIZER": "cpu", "PARAM": "cpu"}, "parameters"),
    ],
)
def test_offload_of_the_launcher(change: dict[str, str], offload: str | None) -> None:
    devices = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE": device for part, device in change.items()}
    launcher = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} | devices
    assert choose(2, launcher, device="cuda").config == StrategyConfig(name="zero3", offload=offload)  # type: ignore[arg-type]


def test_offload_to_a_disk() -> None:
    for part in ("OPTIMIZER", "PARAM"):
        error = refusal(2, ZERO | {f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE": "nvme"}, device="cuda")
        assert "the launcher asks to offload to nvme" in error.message


def test_accumulation_of_the_launcher() -> None:
    asked = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    for steps in ("1", "auto", "3"):  # 1 is the launcher's default
        assert choose(2, ZERO | {asked: steps}, micro_batch=4).shape.accumulation == 3
    error = refusal(2, ZERO | {asked: "4"}, micro_batch=4)
    assert "--gradient_accumulation_steps 4, but the recipe accumulates 3" in error.message
    assert "(--train.global_batch 24 / (micro-batch 4 × 2 ranks))" in error.message


def test_clipping_of_the_launcher() -> None:
    asked = "ACCELERATE_GRADIENT_CLIPPING"
    for clipping, own in (("1.0", 1.0), ("1", 1.0), ("auto", 1.0), ("none", 0.5), ("0.0", None), ("0.5", 0.5)):
        assert choose(2, ZERO | {asked: clipping}, max_grad_norm=own).max_grad_norm == own
    for clipping, own in (("0.5", 1.0), ("1.0", None), ("0", 1.0), ("a little", 1.0)):
        message = f"the launcher asks for --gradient_clipping {clipping}, but --train.max_grad_norm is {own}"
        assert refusal(2, ZERO | {asked: clipping}, max_grad_norm=own).message == message


def test_file_of_the_launcher(deepspeed: Callable[[Any], Path]) -> None:
    path = deepspeed({"zero_optimization": {"stage": 1}})
    launcher = ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert choose(2, launcher).config == StrategyConfig(name="zero1", deepspeed=path)
    assert choose(2, launcher, deepspeed=path).config.deepspeed == path
    message = f"--strategy.deepspeed other.json contradicts the launcher, which asks for {path}"
    assert refusal(2, launcher, deepspeed=Path("other.json")).message == message
    with pytest.raises(LaunchError, match="for stage 1"):
        choose(2, launcher | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})


# A DeepSpeed JSON of the user.

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    # As in the files that everybody passes on.
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 123456, "allgather_bucket_size": "auto"},
    "communication_data_type": "auto",
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
}
AGREEING = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 2},
}


@pytest.mark.parametrize("content", [{}, AUTO, AGREEING], ids=["empty", "auto", "agreeing"])
def test_file_that_agrees(content: dict[str, Any], deepspeed: Callable[[Any], Path]) -> None:
    strategy: Any = choose(2, name="zero2", precision="bf16", micro_batch=4, deepspeed=deepspeed(content))
    found = strategy._engine_config()
    assert {key: found[key] for key in AGREEING if key not in ("fp16", "zero_optimization")} == {
        key: value for key, value in AGREEING.items() if key not in ("fp16", "zero_optimization")
    }
    assert found["fp16"]["enabled"] is False
    own = {"reduce_bucket_size": 123456} if content is AUTO else {}
    assert found["zero_optimization"] == {"stage": 2, **own}
    assert found["communication_data_type"] == "fp32"
    assert "auto" not in json.dumps(found)


def test_keys_of_the_user_are_kept(deepspeed: Callable[[Any], Path]) -> None:
    own = {"steps_per_print": 5, "wall_clock_breakdown": True, "communication_data_type": "bf16"}
    strategy: Any = choose(2, name="zero1", deepspeed=deepspeed(own))
    found = strategy._engine_config()
    assert {key: found[key] for key in own} == own


@pytest.mark.parametrize(
    ("content", "precision", "key", "found", "decided"),
    [
        ({"train_batch_size": 16}, "fp32", "train_batch_size", "16", "24"),
        ({"train_micro_batch_size_per_gpu": 2}, "fp32", "train_micro_batch_size_per_gpu", "2", "4"),
        ({"gradient_accumulation_steps": 1}, "fp32", "gradient_accumulation_steps", "1", "3"),
        ({"gradient_clipping": 0.5}, "fp32", "gradient_clipping", "0.5", "1.0"),
        ({"bf16": {"enabled": True}}, "fp32", "bf16.enabled", "True", "False"),
        ({"bf16": {"enabled": False}}, "bf16", "bf16.enabled", "False", "True"),
        ({"fp16": {"enabled": True}}, "bf16", "fp16.enabled", "True", "False"),
        ({"fp16": {"loss_scale_window": 1000}}, "fp16", "fp16.loss_scale_window", "1000", "2000"),
        ({"fp16": {"hysteresis": 2}}, "fp16", "fp16.hysteresis", "2", "1"),
        ({"fp16": {"loss_scale": 128}}, "fp16", "fp16.loss_scale", "128", "0"),
        ({"bf16": True}, "bf16", "bf16", "True", "{'enabled': True}"),
        ({"zero_optimization": {"stage": 3}}, "fp32", "zero_optimization.stage", "3", "2"),
        ({"zero_optimization": {"stage": 0}}, "fp32", "zero_optimization.stage", "0", "2"),
    ],
)
def test_file_that_contradicts(
    content: dict[str, Any],
    precision: str,
    key: str,
    found: str,
    decided: str,
    deepspeed: Callable[[Any], Path],
) -> None:
    path = deepspeed(content)
    # On a GPU, so that fp16 is one more way in which the recipe may have decided.
    error = refusal(2, device="cuda", name="zero2", precision=precision, micro_batch=4, deepspeed=path)
    assert error.message == f"'{key}': {found} in {path} contradicts the recipe's {decided}"
    assert error.remedy == 'The recipe decides it: set it to "auto" or leave it out.'


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("bf_16", "bf16"),
        ("wall_clock_breakdwon", "wall_clock_breakdown"),
        ("qqq", None),
    ],
)
def test_misspelt_key(key: str, hint: str | None, deepspeed: Callable[[Any], Path]) -> None:
    message = refusal(2, name="zero2", deepspeed=deepspeed({key: 1})).message
    assert f"DeepSpeed would ignore '{key}' in " in message
    assert ("Did you mean" in message) == (hint is not None)
    assert hint is None or f"Did you mean '{hint}'?" in message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"reduce_bucket_sise": 1}, "'zero_optimization.reduce_bucket_sise': Extra inputs are not permitted. Did you"),
        ({"prefetch": 1}, "'zero_optimization.prefetch': Extra inputs"),
        ({"reduce_bucket_size": "large"}, "'zero_optimization.reduce_bucket_size': Input should be a valid integer"),
        ({"offload_optimizer": {"device": "disk"}}, "'zero_optimization.offload_optimizer.device': Input should be"),
        ({"offload_optimizer": {"devise": "cpu"}}, "'zero_optimization.offload_optimizer.devise': Extra inputs"),
        ({"stage3_prefetch_bucket_size": 1}, "'zero_optimization.stage3_prefetch_bucket_size'"),
        ({"cpu_offload": True}, "'zero_optimization.cpu_offload'"),
        ({"compute_grad_norm": False}, "'zero_optimization.compute_grad_norm'"),
        ("stage 2", "'zero_optimization' in "),
        (2, "'zero_optimization' in "),
    ],
)
def test_wrong_key_in_the_zero_section(section: Any, message: str, deepspeed: Callable[[Any], Path]) -> None:
    path = deepspeed({"zero_optimization": section})
    error = refusal(2, name="zero2", deepspeed=path)
    assert message in error.message
    assert str(path) in error.message


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [("bf16", {"enable": True}, "enabled"), ("fp16", {"enabled": False, "loss_scal": 0}, "loss_scale")],
)
def test_wrong_key_in_a_precision_section(key: str, value: Any, hint: str, deepspeed: Callable[[Any], Path]) -> None:
    message = refusal(2, name="zero2", deepspeed=deepspeed({key: value})).message
    assert f"'{key}." in message
    assert f"Did you mean '{hint}'?" in message


@pytest.mark.parametrize(
    "key",
    [
        *("optimizer", "scheduler", "amp", "activation_checkpointing", "aio", "compile", "tensorboard", "elasticity"),
        *("prescale_gradients", "gradient_predivide_factor", "data_efficiency", "dataloader_drop_last", "pipeline"),
    ],
)
def test_refused_section(key: str, deepspeed: Callable[[Any], Path]) -> None:
    message = refusal(2, name="zero2", deepspeed=deepspeed({key: {}})).message
    assert message.startswith(f"'{key}' in ")
    assert message.endswith("has no effect in this recipe")


@pytest.mark.parametrize(
    ("name", "offload", "section", "fault"),
    [
        ("zero2", None, {"offload_optimizer": {"device": "cpu"}}, "offload_optimizer: cpu"),
        ("zero2", "optimizer", {"offload_optimizer": {"device": "none"}}, "offload_optimizer: none"),
        ("zero2", "optimizer", {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer: nvme"),
        ("zero3", "optimizer", {"offload_param": {"device": "cpu"}}, "offload_param: cpu"),
        ("zero3", "parameters", {"offload_param": {"device": "none"}}, "offload_param: none"),
    ],
)
def test_offload_in_the_file_that_contradicts(
    name: str, offload: str | None, section: dict[str, Any], fault: str, deepspeed: Callable[[Any], Path]
) -> None:
    path = deepspeed({"zero_optimization": section})
    error = refusal(2, device="cuda", name=name, offload=offload, deepspeed=path)
    assert error.message == f"zero_optimization.{fault} in {path} contradicts --strategy.offload {offload}"


def test_offload_in_the_file_that_agrees(deepspeed: Callable[[Any], Path]) -> None:
    section = {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "offload_param": None}
    path = deepspeed({"zero_optimization": section})
    strategy: Any = choose(2, device="cuda", name="zero3", offload="parameters", deepspeed=path)
    found = strategy._engine_config()["zero_optimization"]
    assert found["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert found["offload_param"] == {"device": "cpu", "pin_memory": True}
    unset = deepspeed({"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    assert choose(2, name="zero2", deepspeed=unset).config.offload is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold an object"),
        ('{"bf16": {}, "bf16": {}}', "is not valid JSON: bf16 stands twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "is not valid JSON: stage stands twice"),
    ],
)
def test_file_that_is_no_settings(content: str, message: str, deepspeed: Callable[[Any], Path]) -> None:
    path = deepspeed(content)
    with pytest.raises(ConfigError) as caught:
        choose(2, name="zero2", deepspeed=path)
    assert f"--strategy.deepspeed {path} {message}" in caught.value.message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.json: No such file or directory"):
        choose(2, name="zero2", deepspeed=tmp_path / "nothing.json")


# The engine itself.


def trained_with_a_file(path: Path) -> dict[str, Any]:
    w = world()
    w.connect()
    shape = BatchShape(12, 3, 2, 2)
    strategy: Any = choose_strategy(
        StrategyConfig(name="zero2", deepspeed=path),
        world=w,
        precision=Precision("fp32"),
        shape=shape,
        max_grad_norm=0.25,
    )
    strategy.setup(tiny_bert(), lambda model: adamw(model, OptimConfig()))
    task = Recording()
    task.seen.append([])
    (step,) = Loader(tiny_data(), task.collate, shape, rank=w.rank).steps(1)
    result = train_step(strategy, task, step, learning_rate=1e-3, seed=0)
    found = {
        "reduce_bucket_size": strategy.engine.zero_reduce_bucket_size(),
        "optimizer's": strategy.optimizer.reduce_bucket_size,
        "allgather_bucket_size": strategy.engine.zero_allgather_bucket_size(),
        "communication": str(strategy.engine.communication_data_type),
        "effective": strategy.effective(),
        "applied": result.applied,
        "seen": sorted(task.seen[0]),
    }
    strategy.teardown()
    w.close()
    return found


def test_file_reaches_the_engine(deepspeed: Callable[[Any], Path]) -> None:
    section = {"stage": "auto", "reduce_bucket_size": 4321, "allgather_bucket_size": 8764}
    first, second = on_ranks(trained_with_a_file, 2, deepspeed(AUTO | {"zero_optimization": section}))
    for found in (first, second):
        assert found["reduce_bucket_size"] == found["optimizer's"] == 4321
        assert found["allgather_bucket_size"] == 8764
        assert found["communication"] == "torch.float32"
        assert found["applied"]
        effective = found["effective"]
        assert (effective["strategy"], effective["stage"], effective["ranks"]) == ("zero2", 2, 2)
        assert (effective["global_batch"], effective["micro_batch"], effective["accumulation"]) == (12, 3, 2)
        assert effective["max_grad_norm"] == 0.25
        assert effective["share_of_this_rank"] == pytest.approx(0.5, abs=0.01)
    assert len(first["seen"]) == len(second["seen"]) == 6
    assert set(first["seen"]).isdisjoint(second["seen"])


def refused_by_deepspeed(path: Path) -> str:
    w = world()
    w.connect()
    strategy = choose_strategy(
        StrategyConfig(name="zero2", deepspeed=path),
        world=w,
        precision=Precision("fp32"),
        shape=BatchShape(12, 3, 2, 2),
        max_grad_norm=None,
    )
    with pytest.raises(ConfigError) as caught:
        strategy.setup(tiny_bert(), lambda model: adamw(model, OptimConfig()))
    w.close()
    return caught.value.message


def test_value_that_the_engine_refuses(deepspeed: Callable[[Any], Path]) -> None:
    path = deepspeed({"zero_optimization": {"allgather_bucket_size": 8765}})
    for message in on_ranks(refused_by_deepspeed, 2, path):
        assert message.startswith(f"DeepSpeed does not take {path}: allgather_bucket_size must be a multiple")


def trained_alone(name: str) -> tuple[list[float], bool]:
    """Past the check, which refuses one process on a CPU: on a GPU it may offload."""
    w = world()
    w.connect()
    shape = BatchShape(12, 6, 2, 1)
    options: Any = {"world": w, "precision": Precision("fp32"), "shape": shape, "max_grad_norm": 1.0}
    strategy = STRATEGIES[name](name, StrategyConfig(name=name), **options)  # type: ignore[arg-type]
    strategy.setup(tiny_bert(), lambda model: adamw(model, OptimConfig()))
    task = Recording()
    task.seen.append([])
    steps = Loader(tiny_data(), task.collate, shape).steps(3)
    losses = [train_step(strategy, task, step, learning_rate=1e-3, seed=0).loss for step in steps]
    strategy.teardown()
    w.close()
    return losses, torch.distributed.is_initialized() or w.connected


def test_engines_that_want_a_group_get_one_of_one_process() -> None:
    ((alone, _),) = on_ranks(trained_alone, 1, "single")
    for name in ("zero2", "zero3"):
        ((losses, left_over),) = on_ranks(trained_alone, 1, name)
        assert losses == pytest.approx(alone, rel=1e-5)
        assert not left_over
