"""Ranks: what the environment of a launcher means, which ones are refused, and what connected ranks do in concert."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import free_port, on_ranks
from toolkit.environment import ALONE, RENDEZVOUS, Launcher, Ranks, cpu_asked_for, is_main_rank
from toolkit.errors import CheckpointError, LaunchError
from toolkit.world import world

TWO_RANKS = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "ACCELERATE_USE_CPU": "true",
}
INCOMPLETE = [
    names for count in range(1, len(RENDEZVOUS)) for names in itertools.combinations(RENDEZVOUS, count)
]  # every part of the five that is neither none nor all


# The numbers of a rank.


def test_one_process() -> None:
    assert Ranks.read({}) == Ranks(0, 1, 0, 1, "")
    w = world({})
    assert (w.rank, w.size, w.local_rank, w.local_size, w.main, w.connected) == (0, 1, 0, 1, True, False)
    assert w.launcher == Launcher()


def test_several_processes() -> None:
    assert Ranks.read(TWO_RANKS) == Ranks(1, 2, 1, 2, "127.0.0.1:29500")
    w = world(TWO_RANKS)
    assert (w.rank, w.size, w.local_rank, w.local_size, w.main) == (1, 2, 1, 2, False)
    assert w.device == torch.device("cpu")


def test_two_nodes() -> None:
    second = TWO_RANKS | {"RANK": "3", "WORLD_SIZE": "4"}
    assert Ranks.read(second) == Ranks(3, 4, 1, 2, "127.0.0.1:29500")


def test_a_launcher_without_local_world_size_has_one_node() -> None:
    environment = {name: value for name, value in TWO_RANKS.items() if name != "LOCAL_WORLD_SIZE"}
    assert Ranks.read(environment).local_size == 2


def test_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO_RANKS.items():
        monkeypatch.setenv(name, value)
    assert Ranks.read() == Ranks.read(TWO_RANKS)
    assert cpu_asked_for()
    assert not is_main_rank()
    assert world().rank == 1


def test_incomplete_environments_are_all_here() -> None:
    assert len(INCOMPLETE) == 2 ** len(RENDEZVOUS) - 2


@pytest.mark.parametrize("names", INCOMPLETE, ids="+".join)
def test_incomplete_environment(names: tuple[str, ...]) -> None:
    with pytest.raises(LaunchError) as caught:
        world({name: TWO_RANKS[name] for name in names})
    present, missing = caught.value.message.split(" set in the environment, but ")
    assert all(name in present for name in names)
    assert all(name in missing for name in RENDEZVOUS if name not in names)
    assert "accelerate launch" in caught.value.remedy


def test_empty_variable_is_a_missing_one() -> None:
    with pytest.raises(LaunchError, match="LOCAL_RANK not"):
        Ranks.read(TWO_RANKS | {"LOCAL_RANK": ""})


def test_cpu_launch_of_several_that_started_one() -> None:
    # What `accelerate launch --cpu --num_processes 2` sets, with and without --cpu.
    for asked in ("True", "False"):
        environment = {"ACCELERATE_USE_CPU": asked, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        with pytest.raises(LaunchError, match="several processes were asked for and one was started") as caught:
            world(environment)
        assert "configs/accelerate/cpu2.yaml" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1' is not a number"),
        ({"RANK": "one"}, "RANK='one' is not a number"),
        ({"RANK": "²"}, "RANK='²' is not a number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is not a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a number"),
        ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE='all' is not a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
    ],
)
def test_numbers_that_cannot_be(change: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        world(TWO_RANKS | change)
    assert message in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(("value", "main"), [(None, True), ("", True), ("0", True), ("1", False), ("17", False)])
def test_main_rank(value: str | None, main: bool) -> None:
    assert is_main_rank({} if value is None else {"RANK": value}) is main


# What the launcher asks for.


def test_nothing_asked_for() -> None:
    assert Launcher.read({}) == Launcher(None, None, {})
    assert Launcher.read({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}) == Launcher()


def test_options_are_those_of_the_strategy() -> None:
    fsdp = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}
    zero = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    assert Launcher.read(fsdp | zero) == Launcher()  # left over in a shell, and asked for by nobody
    assert Launcher.read({"ACCELERATE_USE_FSDP": "true", **fsdp, **zero}) == Launcher("fsdp", None, fsdp)
    assert Launcher.read({"ACCELERATE_USE_DEEPSPEED": "true", **fsdp, **zero}) == Launcher("zero1", None, zero)


def test_deepspeed_without_a_stage_is_stage_2() -> None:
    assert Launcher.read({"ACCELERATE_USE_DEEPSPEED": "true"}).strategy == "zero2"


def test_stage_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert Launcher.read(environment).strategy == "zero3"
    assert Launcher.read(environment | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}).strategy == "zero3"
    with pytest.raises(LaunchError, match=r"--zero_stage 2, but its file .*zero.json for stage 3"):
        Launcher.read(environment | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"zero_optimization": {}}', '{"zero_optimization": 3}', None])
def test_file_without_a_stage(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LaunchError, match=r"zero\.json names no ZeRO stage"):
        Launcher.read({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "--use_parallelism_config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp4"}, "--mixed_precision fp4"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend INDUCTOR"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "--zero_stage 0"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        world(environment)
    assert caught.value.remedy


# The real launcher. All launches run at once, and each test looks at its own.

SCRIPT = """
    import dataclasses, json, os, sys
    from pathlib import Path
    from toolkit.environment import Launcher, Ranks
    found = dataclasses.asdict(Ranks.read()) | {"launcher": dataclasses.asdict(Launcher.read())}
    Path(sys.argv[1], os.environ.get("RANK", "alone")).write_text(json.dumps(found))
"""
REFUSED = """
    import json, sys
    from pathlib import Path
    from toolkit.errors import LaunchError
    from toolkit.world import world
    try:
        world()
    except LaunchError as error:
        Path(sys.argv[1], "alone").write_text(json.dumps({"error": str(error)}))
"""
FSDP1 = """
    compute_environment: LOCAL_MACHINE
    distributed_type: FSDP
    num_machines: 1
    num_processes: 2
    fsdp_config:
      fsdp_version: 1
      fsdp_reshard_after_forward: SHARD_GRAD_OP
      fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
      fsdp_transformer_layer_cls_to_wrap: BertLayer
"""
LAUNCHES = {
    "plain": [],
    "cpu 2": ["--cpu", "--num_processes", "2"],
    "fsdp": ["--use_fsdp", "--num_processes", "2", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "false"],
    "fsdp1 file": ["--config_file", "FSDP1"],
    "zero3 bf16": ["--use_deepspeed", "--zero_stage", "3", "--num_processes", "2", "--mixed_precision", "bf16"],
}


@dataclasses.dataclass
class Launch:
    process: subprocess.Popen[str]
    folder: Path

    def ranks(self) -> list[dict[str, Any]]:
        output, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, output
        return [json.loads(path.read_text()) for path in sorted(self.folder.iterdir())]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launch]]:
    folder = tmp_path_factory.mktemp("launches")
    for script, text in (("script", SCRIPT), ("refused", REFUSED)):
        (folder / f"{script}.py").write_text(textwrap.dedent(text))
    (folder / "fsdp1.yaml").write_text(textwrap.dedent(FSDP1))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(folder)}
    started = {}
    for name, options in LAUNCHES.items():
        (folder / name).mkdir()
        options = [str(folder / "fsdp1.yaml") if option == "FSDP1" else option for option in options]
        port = ["--main_process_port", "0"] if name not in ("plain", "cpu 2") else []
        script = folder / ("refused.py" if name == "cpu 2" else "script.py")
        command = ["accelerate.commands.launch", *port, *options, str(script), str(folder / name)]
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started[name] = Launch(process, folder / name)
    yield started
    for launch in started.values():
        launch.process.kill()
        launch.process.communicate()


def test_plain_launch(launches: dict[str, Launch]) -> None:
    (alone,) = launches["plain"].ranks()
    assert (alone["rank"], alone["size"]) == (0, 1)
    assert alone["launcher"] == {"strategy": None, "precision": None, "options": {}}


def test_cpu_launch_of_two_is_refused(launches: dict[str, Launch]) -> None:
    (alone,) = launches["cpu 2"].ranks()
    assert alone["error"].startswith("several processes were asked for and one was started")
    assert "accelerate launch --config_file configs/accelerate/cpu2.yaml" in alone["error"]


def test_fsdp_launch(launches: dict[str, Launch]) -> None:
    ranks = launches["fsdp"].ranks()
    assert [(found["rank"], found["size"], found["local_rank"], found["local_size"]) for found in ranks] == [
        (0, 2, 0, 2),
        (1, 2, 1, 2),
    ]
    for found in ranks:
        assert (found["launcher"]["strategy"], found["launcher"]["precision"]) == ("fsdp", None)
        assert found["launcher"]["options"]["FSDP_VERSION"] == "2"
        assert found["launcher"]["options"]["FSDP_RESHARD_AFTER_FORWARD"] == "false"


def test_launch_with_a_file_of_accelerate_config(launches: dict[str, Launch]) -> None:
    for found in launches["fsdp1 file"].ranks():
        assert found["launcher"]["strategy"] == "fsdp"
        # The questionnaire for FSDP1 writes the layout's name here, and the launcher lowers its case.
        assert found["launcher"]["options"]["FSDP_RESHARD_AFTER_FORWARD"] == "shard_grad_op"
        assert found["launcher"]["options"]["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "BertLayer"


def test_deepspeed_launch(launches: dict[str, Launch]) -> None:
    ranks = launches["zero3 bf16"].ranks()
    assert [(found["rank"], found["size"]) for found in ranks] == [(0, 2), (1, 2)]
    for found in ranks:
        assert found["launcher"] == {
            "strategy": "zero3",
            "precision": "bf16",
            "options": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        }


# Connected ranks.


def in_concert() -> dict[str, Any]:
    w = world()
    alone = (w.connected, w.sum(torch.tensor(1.0)).item(), w.gather(w.rank), w.on_main(lambda: w.rank))
    w.connect()
    w.connect()
    found = {
        "alone": alone,
        "backend": dist.get_backend(),
        "sum": w.sum(torch.tensor([w.rank + 1.0, 1.0])).tolist(),
        "gather": w.gather({"rank": w.rank}),
        "on_main": w.on_main(lambda: f"said by rank {w.rank}"),
    }
    w.same_on_all_ranks("the seed", {"seed": 1, "betas": [0.9, 0.999]})
    w.close()
    return found | {"closed": not dist.is_initialized()}


def test_ranks_in_concert() -> None:
    for rank, found in enumerate(on_ranks(in_concert, 3)):
        assert found == {
            "alone": (False, 1.0, [rank], 0 if rank == 0 else None),
            "backend": "gloo",
            "sum": [6.0, 3.0],
            "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "on_main": "said by rank 0",
            "closed": True,
        }


def alone(launched: bool) -> list[bool]:
    if launched:
        os.environ.update(ALONE)
    w = world()
    w.connect()
    found = [w.connected, dist.is_initialized()]
    w.form_group()
    w.form_group()
    found += [w.connected, dist.is_initialized(), world().rank == 0, w.gather(3) == [3]]
    w.close()
    return [*found, dist.is_initialized()]


def test_one_process_has_a_group_only_where_it_is_launched_or_asks() -> None:
    assert on_ranks(alone, 1, False) == [[False, False, False, True, True, True, False]]
    assert on_ranks(alone, 1, True) == [[False, True, False, True, True, True, False]]


def errors_on_main() -> list[tuple[str, str]]:
    w = world()
    w.connect()

    def fail(error: Exception) -> None:
        assert w.main
        raise error

    seen = []
    for error in (CheckpointError("the folder is taken", "Take another."), OSError("disk full")):
        try:
            w.on_main(lambda error=error: fail(error))  # type: ignore[misc]
        except Exception as caught:
            seen.append((type(caught).__name__, str(caught)))
    w.close()
    return seen


def test_error_on_main_is_raised_everywhere() -> None:
    users, defect = zip(*on_ranks(errors_on_main, 2), strict=True)
    assert users == (("CheckpointError", "the folder is taken\n  → Take another."),) * 2
    assert defect[0] == ("OSError", "disk full")
    assert defect[1][0] == "LaunchError"
    assert defect[1][1].startswith("rank 0 failed: OSError: disk full")


def differing(values: list[Any]) -> str:
    w = world()
    w.connect()
    try:
        w.same_on_all_ranks("the configuration", values[w.rank])
    except LaunchError as error:
        return error.message
    finally:
        w.close()
    return ""


def test_ranks_that_differ_are_named() -> None:
    expected = "the configuration differs between rank 0 and ranks [2]"
    assert on_ranks(differing, 3, [{"lr": 1e-4}, {"lr": 1e-4}, {"lr": 1e-3}]) == [expected] * 3


def test_equal_values_are_the_same_whatever_objects_they_are_made_of() -> None:
    word = "bf16, as asked"
    other = "".join(list(word))
    assert on_ranks(differing, 2, [{"a": [word, word], "b": 0.1}, {"b": 0.1, "a": [word, other]}]) == ["", ""]


def port_is_taken() -> str:
    w = world()
    if not w.main:
        return ""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        listener.listen()
        with pytest.raises(LaunchError) as caught:
            w.connect()
    return caught.value.message


def test_ranks_that_cannot_meet() -> None:
    message, _ = on_ranks(port_is_taken, 2)
    assert message.startswith("rank 0 of 2 could not meet the others at 127.0.0.1:")


def test_ctrl_c_while_the_others_are_waited_for(tmp_path: Path) -> None:
    """Python would call its handler when the wait in C code is over, half an hour later."""
    script = "from toolkit.world import world; print('waiting', flush=True); world().connect()"
    environment = os.environ | TWO_RANKS | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
