"""Reads settings: the defaults, over them a YAML file, over that the command line."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from toolkit.errors import ConfigError, nearest

Config = TypeVar("Config")


def parse(
    config_class: type[Config], argv: Sequence[str] | None = None, *, description: str = "", quiet: bool = False
) -> Config:
    """The settings of a recipe: defaults, then `--config FILE`, then the command line.

    Args:
        config_class: a frozen dataclass whose fields are sections (frozen dataclasses) or plain values.
        argv: the command line without the program's name; `sys.argv[1:]` by default.
        description: what `--help` says first.
        quiet: print nothing (for ranks other than the first); errors are raised or exit all the same.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
        SystemExit: after `--help` or `--print-config` (code 0); after an error that the command line's parser
            has explained (code 2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = _take_option(arguments, "--config")
    if _take_option(arguments, "--config") is not None:
        raise ConfigError("--config is given twice", "Name one file; the command line overrides its keys.")
    print_config = _take_flag(arguments, "--print-config", "--print_config")
    default = from_yaml(config_class, Path(path)) if path else config_class()
    config = tyro.cli(
        config_class,
        args=arguments,
        default=default,
        description=_help(description),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        use_underscores=True,
        console_outputs=not quiet,
    )
    config = validate(config_class, dataclasses.asdict(config), "the command line")  # type: ignore[call-overload]
    if print_config:
        if not quiet:
            print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def from_yaml(config_class: type[Config], path: Path) -> Config:
    """The settings in a YAML file, laid over the defaults of `config_class`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}", "Name a YAML file that is there.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold a mapping of sections, not a {type(content).__name__}")
    values = dataclasses.asdict(config_class())  # type: ignore[call-overload]
    _lay_over(values, content, (), str(path))
    return validate(config_class, values, str(path))


def validate(config_class: type[Config], values: dict[str, Any], where: str) -> Config:
    """`values` as a `config_class`; a wrong type or a value out of range is a `ConfigError` that names `where`."""
    try:
        return _adapter(config_class).validate_python(values)  # type: ignore[arg-type, no-any-return]
    except ValidationError as error:
        lines = []
        for item in error.errors():
            # Pydantic names the branch of a union behind the key ("int", "constrained-int"): keep the key alone.
            key = ".".join(str(part) for part in item["loc"] if _is_key(config_class, item["loc"], part))
            lines.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}")
        raise ConfigError(f"in {where}: " + "; ".join(dict.fromkeys(lines)), "See --help for each key.") from error


def to_yaml(config: Any) -> str:
    """The settings as YAML that `--config` reads back to the same object."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def plain(config: Any) -> Any:
    """The settings as mappings, lists, strings and numbers."""
    return _adapter(type(config)).dump_python(config, mode="json")  # type: ignore[arg-type]


@functools.cache
def _adapter(config_class: Any) -> TypeAdapter[Any]:
    """Of a class of settings; to make one takes hundredths of a second."""
    return TypeAdapter(config_class)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _lay_over(values: dict[str, Any], content: dict[Any, Any], parents: tuple[str, ...], where: str) -> None:
    for key, value in content.items():
        name = ".".join((*parents, str(key)))
        if key not in values:
            raise ConfigError(
                f"unknown key '{name}' in {where}.{nearest(str(key), values)}", f"Keys there: {', '.join(values)}."
            )
        if isinstance(values[key], dict):
            if value is None:  # a section whose keys are all commented out
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"'{name}' in {where} is a section and takes a mapping, not {value!r}")
            _lay_over(values[key], value, (*parents, str(key)), where)
        else:
            values[key] = value


def _is_key(config_class: type, location: tuple[Any, ...], part: Any) -> bool:
    fields: Any = config_class
    for step in location:
        names = {f.name: f.type for f in dataclasses.fields(fields)} if dataclasses.is_dataclass(fields) else {}
        if step not in names:
            return False
        if step == part:
            return True
        fields = _section(config_class, step)
    return False


def _section(config_class: Any, name: str) -> type:
    default = next((f.default for f in dataclasses.fields(config_class) if f.name == name), None)
    return type(default)


def _take_option(arguments: list[str], option: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise ConfigError(f"{option} needs a file")
            value = arguments[index + 1]
            del arguments[index : index + 2]
            return value
        if argument.startswith(option + "="):
            del arguments[index]
            return argument.removeprefix(option + "=")
    return None


def _take_flag(arguments: list[str], *spellings: str) -> bool:
    before = len(arguments)
    arguments[:] = [argument for argument in arguments if argument not in spellings]
    return len(arguments) < before


def _help(description: str) -> str:
    return (
        f"{description.strip()}\n\n--config FILE reads settings from YAML before the options here; "
        "--print-config shows the resolved settings and stops."
    )
