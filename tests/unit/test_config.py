"""Settings: where they come from, which one wins, and that no wrong one passes in silence."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolkit.config import (
    AdapterConfig,
    ChatConfig,
    CheckpointConfig,
    CorpusConfig,
    DecoderConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    Precision,
    PreferenceConfig,
    RunConfig,
    SourcesConfig,
    StrategyConfig,
    TextDataConfig,
    TokenizerConfig,
    TrainConfig,
    from_yaml,
    parse,
    plain,
    sections,
    to_yaml,
)
from toolkit.errors import ConfigError

SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": TextDataConfig,
    "decoder": DecoderConfig,
    "tokenizer": TokenizerConfig,
    "corpus": CorpusConfig,
    "chat": ChatConfig,
    "pairs": PairsConfig,
    "preference": PreferenceConfig,
    "generate": GenerateConfig,
    "train": TrainConfig,
    "optim": OptimConfig,
    "strategy": StrategyConfig,
    "checkpoint": CheckpointConfig,
    "run": RunConfig,
}
DEFAULT = {name: kind() for name, kind in SECTIONS.items()}


@dataclass(frozen=True)
class Config:
    """Settings of a recipe for tests."""

    model: ModelConfig = DEFAULT["model"]
    adapter: AdapterConfig = DEFAULT["adapter"]
    data: TextDataConfig = DEFAULT["data"]
    decoder: DecoderConfig = DEFAULT["decoder"]
    tokenizer: TokenizerConfig = DEFAULT["tokenizer"]
    corpus: CorpusConfig = DEFAULT["corpus"]
    chat: ChatConfig = DEFAULT["chat"]
    pairs: PairsConfig = DEFAULT["pairs"]
    preference: PreferenceConfig = DEFAULT["preference"]
    generate: GenerateConfig = DEFAULT["generate"]
    train: TrainConfig = DEFAULT["train"]
    optim: OptimConfig = DEFAULT["optim"]
    precision: Precision = "auto"
    """Number format."""
    strategy: StrategyConfig = DEFAULT["strategy"]
    checkpoint: CheckpointConfig = DEFAULT["checkpoint"]
    run: RunConfig = DEFAULT["run"]


KEYS = [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def parsed(line: str, **options: Any) -> Config:
    return parse(Config, line.split(), **options)


def file(folder: Path, content: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def complaint(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What the command line's parser says when it leaves with exit code 2, as one line."""
    with pytest.raises(SystemExit) as caught:
        parsed(line)
    assert caught.value.code == 2
    said = capsys.readouterr()
    return " ".join((said.out + said.err).replace("│", " ").split())


def test_all_sections_are_tested() -> None:
    there = {kind for _, kind in inspect.getmembers(sections, dataclasses.is_dataclass)}
    assert there == {*SECTIONS.values(), SourcesConfig}  # what two of them share
    assert len(KEYS) > 50


# Where they come from.


def test_precedence(tmp_path: Path) -> None:
    path = file(tmp_path, "train: {steps: 5, global_batch: 8}\nprecision: bf16\noptim: {lr: 1e-3}\n")
    config = parsed(f"--optim.lr 2e-3 --config {path} --train.steps 7")
    assert config.train.steps == 7  # command line over file
    assert config.optim.lr == 2e-3
    assert config.train.global_batch == 8  # file over default
    assert config.precision == "bf16"
    assert config.train.epochs == TrainConfig().epochs  # default
    assert config.model == ModelConfig()


def test_command_line_can_undo_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "train: {steps: 5, max_grad_norm: null}\ndata: {deduplicate: false}\nmodel: {freeze: [a]}\n")
    assert parsed(f"--config={path}").train == TrainConfig(steps=5, max_grad_norm=None)
    config = parsed(
        f"--config={path} --train.steps None --train.max_grad_norm 2 --data.deduplicate True --model.freeze"
    )
    assert config == dataclasses.replace(Config(), train=TrainConfig(max_grad_norm=2.0))


def test_no_settings_are_the_defaults(tmp_path: Path) -> None:
    assert parsed("") == Config()
    for content in ("", "# nothing\n", "train:\n  # steps: 3\noptim:\n"):
        assert from_yaml(Config, file(tmp_path, content)) == Config()


def test_the_line_of_the_specification() -> None:
    line = (
        "--strategy.name fsdp --precision fp32 --model.dropout 0 --train.steps 12 --train.global_batch 12 "
        "--run.log_every 1 --run.dir runs/x"
    )
    assert parsed(line) == Config(
        strategy=StrategyConfig(name="fsdp"),
        precision="fp32",
        model=ModelConfig(dropout=0.0),
        train=TrainConfig(steps=12, global_batch=12),
        run=RunConfig(log_every=1, dir=Path("runs/x")),
    )


def test_hyphens_and_underscores() -> None:
    expected = dataclasses.replace(Config(), optim=OptimConfig(warmup_steps=3, weight_decay=0.1))
    assert parsed("--optim.warmup_steps 3 --optim.weight_decay 0.1") == expected
    assert parsed("--optim.warmup-steps 3 --optim.weight-decay=0.1") == expected


def test_values_of_every_kind(tmp_path: Path) -> None:
    line = (
        "--model.freeze embeddings layer.[01] --optim.betas 0.8 0.95 --strategy.deepspeed ds.json --run.trackers "
        "tensorboard --strategy.reshard_after_forward False --data.deduplicate False --model.revision main"
    )
    config = parsed(line)
    assert config.model.freeze == ("embeddings", "layer.[01]")
    assert config.optim.betas == (0.8, 0.95)
    assert config.strategy.deepspeed == Path("ds.json")
    assert config.run.trackers == ("tensorboard",)
    assert config.strategy.reshard_after_forward is False
    assert config.data.deduplicate is False
    assert config.model.revision == "main"
    # YAML takes 1e-4, which has no dot, for a text.
    assert from_yaml(Config, file(tmp_path, "optim: {lr: 1e-4, betas: [0.8, 0.95]}")).optim == OptimConfig(
        lr=1e-4, betas=(0.8, 0.95)
    )


def test_later_option_wins() -> None:
    assert parsed("--train.steps 3 --train.steps 4").train.steps == 4


@pytest.mark.parametrize("spelling", ["--print-config", "--print_config"])
def test_printed_settings_read_back_equal(spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--model.name ./größer --model.freeze a b --optim.betas 0.8 0.95 --strategy.deepspeed x/ds.json "
        "--run.dir runs/x --strategy.reshard_after_forward True --optim.lr 3e-7 --data.text null --run.name 007"
    )
    with pytest.raises(SystemExit) as caught:
        parsed(f"{options} {spelling}")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert set(yaml.safe_load(printed)) == {*SECTIONS, "precision"}
    assert parsed(f"--config {file(tmp_path, printed)}") == parsed(options)


def test_printed_settings_are_silent_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--print-config", quiet=True)
    with pytest.raises(SystemExit) as caught:
        parsed("--nonsense 1", quiet=True)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_plain_settings_are_of_json_and_yaml() -> None:
    config = Config(run=RunConfig(dir=Path("a/b")), model=ModelConfig(freeze=("x",)))
    assert plain(config)["run"]["dir"] == "a/b"
    assert plain(config)["model"]["freeze"] == ["x"]
    assert yaml.safe_load(to_yaml(config)) == plain(config)


# Help.


def explained(section: type) -> dict[str, str]:
    """The string that follows each field in the source, which `--help` shows; of a class and what it extends."""
    classes = {
        node.name: node.body for node in ast.parse(inspect.getsource(sections)).body if isinstance(node, ast.ClassDef)
    }
    texts: dict[str, str] = {}
    for kind in reversed(section.__mro__[:-1]):
        body = classes[kind.__name__]
        for field, after in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(str(after.value.value).split())
    return texts


@pytest.mark.parametrize("section", SECTIONS.values())
def test_every_key_is_explained(section: Any) -> None:
    assert set(explained(section)) == {field.name for field in dataclasses.fields(section)}


def test_help_shows_every_key_and_what_it_is_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        parsed("--help", description="Train something.")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("Train something.", "--config FILE", "--print-config"):
        assert text in shown
    for key in KEYS:
        assert f"--{key} " in shown
    for section in SECTIONS.values():
        for text in explained(section).values():
            assert text in shown


# Wrong keys.


@pytest.mark.parametrize(
    ("content", "key", "hint"),
    [
        ("trian: {steps: 3}", "trian", "train"),
        ("train: {stepz: 3}", "train.stepz", "steps"),
        ("optim: {learning_rate: 3}", "optim.learning_rate", None),
        ("strategy: {reshard_after_foward: true}", "strategy.reshard_after_foward", "reshard_after_forward"),
        ("precison: fp32", "precison", "precision"),
        ("run: {seeds: 1}", "run.seeds", "seed"),
        ("3: 4", "3", None),
    ],
)
def test_unknown_key_in_a_file(content: str, key: str, hint: str | None, tmp_path: Path) -> None:
    path = file(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        parsed(f"--config {path}")
    assert f"unknown key '{key}' in {path}" in caught.value.message
    assert ("Did you mean" in caught.value.message) == (hint is not None)
    assert hint is None or f"'{hint}'" in caught.value.message
    assert "Keys there: " in caught.value.remedy


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--optim.lrr 3", "--optim.lr"),
        ("--train.stepz 3", "--train.steps"),
        ("--trian.steps 3", "--train.steps"),
        ("--strategy.reshard-after-foward True", "--strategy.reshard_after_forward"),
        ("--precison fp32", "--precision"),
        ("--seed 3", "--run.seed"),
    ],
)
def test_unknown_key_on_the_command_line(option: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, option)
    assert f"Unrecognized options: {option.split()[0]}" in said
    assert f"Perhaps you meant: {nearest}" in said or nearest in said.split("Perhaps you meant: ")[1]


def test_a_bare_word_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unrecognized options: fsdp" in complaint(capsys, "fsdp")


# Wrong values. In a file, and on the command line where its parser lets them through, they are ConfigErrors.

WRONG_VALUES = [
    ("model.dropout", "1", "less than 1"),
    ("model.dropout", "-0.1", "greater than or equal to 0"),
    ("data.validation_share", "0", "greater than 0"),
    ("data.test_share", "1", "less than 1"),
    ("data.train_samples", "0", "greater than 0"),
    ("data.max_length", "2", "greater than or equal to 3"),
    ("data.workers", "-1", "greater than or equal to 0"),
    ("data.split_seed", "-1", "greater than or equal to 0"),
    ("train.epochs", "0", "greater than 0"),
    ("train.epochs", "inf", "finite number"),
    ("train.steps", "0", "greater than 0"),
    ("train.micro_batch", "-4", "greater than 0"),
    ("train.global_batch", "0", "greater than 0"),
    ("train.max_grad_norm", "0", "greater than 0"),
    ("train.label_smoothing", "1", "less than 1"),
    ("optim.lr", "0", "greater than 0"),
    ("optim.lr", "nan", "finite number"),
    ("optim.lr", "inf", "finite number"),
    ("optim.weight_decay", "-1", "greater than or equal to 0"),
    ("optim.warmup_share", "1", "less than 1"),
    ("optim.decay_share", "0", "greater than 0"),
    ("optim.final_share", "1.5", "less than or equal to 1"),
    ("strategy.shard_size", "1", "greater than or equal to 2"),
    ("strategy.compress_rank", "0", "greater than 0"),
    ("strategy.compress_start", "1", "greater than or equal to 2"),
    ("run.seed", "-1", "greater than or equal to 0"),
    ("run.seed", str(2**63), "less than"),
    ("run.log_every", "0", "greater than 0"),
    ("run.eval_every", "0", "greater than 0"),
    ("run.early_stopping", "0", "greater than 0"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_VALUES)
def test_value_out_of_range(key: str, value: str, message: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    path = file(tmp_path, f"{section}: {{{name}: {f'.{value}' if value in ('nan', 'inf') else value}}}")
    for line, where in ((f"--{key} {value}", "the command line"), (f"--config {path}", str(path))):
        with pytest.raises(ConfigError) as caught:
            parsed(line)
        assert caught.value.message.startswith(f"in {where}: {key}: ")
        assert message in caught.value.message or "greater than 0, not nan" in caught.value.message
        assert f"not {value.split('.')[0]}" in caught.value.message


def test_sizes() -> None:
    for size in ("5GB", "1.5MB", "200KB", "1TB"):
        assert parsed(f"--checkpoint.max_shard_size {size}").checkpoint.max_shard_size == size
    for size in ("5", "GB", "5apples", "5gb", "-1GB"):
        with pytest.raises(
            ConfigError, match=f"checkpoint.max_shard_size: string should match pattern .*, not '{size}'"
        ):
            parsed(f"--checkpoint.max_shard_size={size}")


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ("train: {steps: many}", "train.steps", "valid integer, not 'many'"),
        ("train: {steps: 1.5}", "train.steps", "valid integer, not 1.5"),
        ("train: {steps: true}", "train.steps", "valid integer, not True"),
        ("train: {steps: [1]}", "train.steps", "valid integer, not [1]"),
        ("train: {global_batch: null}", "train.global_batch", "valid integer, not None"),
        ("run: {early_stopping: true}", "run.early_stopping", "valid integer, not True"),
        ("run: {name: 007}", "run.name", "valid string, not 7"),
        ("run: {debug: perhaps}", "run.debug", "valid boolean"),
        ("optim: {lr: fast}", "optim.lr", "valid number"),
        ("optim: {betas: [0.9]}", "optim.betas", "not"),
        ("optim: {betas: 0.9}", "optim.betas", "valid tuple, not 0.9"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas", "less than 1, not 1.0"),
        ("model: {freeze: embeddings}", "model.freeze", "valid tuple, not 'embeddings'"),
        ("strategy: {name: fdsp}", "strategy.name", "'zero3', not 'fdsp'"),
        ("precision: fp64", "precision", "'fp8', not 'fp64'"),
        ("optim: 3", "'optim'", "is a section and takes a mapping, not 3"),
        ("train: [steps]", "'train'", "is a section and takes a mapping"),
    ],
)
def test_value_of_a_wrong_type_in_a_file(content: str, key: str, message: str, tmp_path: Path) -> None:
    path = file(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        parsed(f"--config {path}")
    assert key in caught.value.message
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    path = file(tmp_path, "train: {steps: 0, micro_batch: x}\noptim: {lr: -1}")
    with pytest.raises(ConfigError) as caught:
        parsed(f"--config {path}")
    for key in ("train.steps: ", "train.micro_batch: ", "optim.lr: "):
        assert caught.value.message.count(key) == 1


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("--optim.lr fast", "--optim.lr"),
        ("--train.steps 1.5", "--train.steps"),
        ("--train.steps 1e3", "--train.steps"),
        ("--train.global_batch None", "--train.global_batch"),
        ("--optim.betas 0.9", "--optim.betas"),
        ("--strategy.name fdsp", "--strategy.name"),
        ("--precision fp64", "--precision"),
        ("--run.debug true", "--run.debug"),
        ("--run.debug", "--run.debug"),
        ("--train.steps", "--train.steps"),
    ],
)
def test_value_of_a_wrong_type_on_the_command_line(line: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert key in complaint(capsys, line)


@pytest.mark.parametrize(("word", "value"), [("True", True), ("False", False)])
def test_booleans(word: str, value: bool, tmp_path: Path) -> None:
    assert parsed(f"--run.debug {word}").run.debug is value
    assert parsed(f"--checkpoint.save_model={word}").checkpoint.save_model is value
    assert from_yaml(Config, file(tmp_path, f"run: {{debug: {word.lower()}}}")).run.debug is value


# Files that are none.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {steps: 3", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- train\n- optim\n", "must hold a mapping of sections, not a list"),
        (b"just a text", "must hold a mapping of sections, not a str"),
        (b"train: {steps: 3}\noptim:\n  lr: 1\ntrain: {epochs: 1}\n", "key 'train' stands twice"),
        (b"train:\n  steps: 3\n  steps: 4\n", "key 'steps' stands twice"),
        (b"? {a: b}\n: 1\n", "is not valid YAML"),
    ],
)
def test_file_that_is_no_settings(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parsed(f"--config {path}")
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_file_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = file(
        tmp_path, f"run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{mark}]]"
    )
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parsed(f"--config {path}")
    assert not mark.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        parsed(f"--config {tmp_path / 'nothing.yaml'}")
    with pytest.raises(ConfigError, match="Is a directory"):
        parsed(f"--config {tmp_path}")
    with pytest.raises(ConfigError, match="--config needs a file"):
        parsed("--train.steps 3 --config")


def test_two_files_are_one_too_many(tmp_path: Path) -> None:
    path = file(tmp_path, "train: {steps: 3}")
    with pytest.raises(ConfigError, match="--config is given twice"):
        parsed(f"--config {path} --config={path}")
