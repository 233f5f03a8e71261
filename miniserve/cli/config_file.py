"""`--config file.yaml`: settings under the names of their options. The command line wins over the file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from miniserve.core import UserError

Settings = dict[str, Any]


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's settings the defaults of the command's options."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **_settings(ctx, path)}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of settings, named like the options (`max-model-len: 8k`); options given here win.",
        metavar="FILE",
        callback=_read,
        is_eager=True,
    ),
]


def _settings(ctx: typer.Context, path: Path) -> Settings:
    """By the parameter's name. Raises `UserError`."""
    options: dict[str, tuple[Any, bool]] = {}  # by what stands behind --: the parameter, and whether it says no to it
    for parameter in ctx.command.params:
        if parameter.param_type_name == "argument":
            options[str(parameter.name)] = parameter, False
        for names, negated in ((parameter.opts, False), (parameter.secondary_opts, True)):
            options |= {name[2:]: (parameter, negated) for name in names if name.startswith("--")}
    for command_line_alone in ("help", "config", "prompt"):
        options.pop(command_line_alone, None)
    settings: Settings = {}
    for key, value in _pairs(path):
        name = key.replace("_", "-")
        if name not in options:
            closest = difflib.get_close_matches(name, options, 1)
            hint = f"did you mean {closest[0]}?" if closest else "`miniserve serve --help` lists them."
            raise UserError(f"--config {path}: {key} is no setting; {hint}")
        parameter, negated = options[name]
        if parameter.name in settings:
            raise UserError(f"--config {path}: {key} is set twice.")
        if value is not None:
            settings[str(parameter.name)] = _value(f"--config {path}: {key}", value, parameter, negated)
    return settings


def _pairs(path: Path) -> list[tuple[str, Any]]:
    # Here and not above: few use it, and `miniserve --help` shall be fast.
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ValueError("it holds no names with values")
        loader = yaml.SafeLoader("")
        pairs = [] if node is None else [(key.value, loader.construct_object(value, True)) for key, value in node.value]
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is no YAML of settings, like `port: 8000`: {reason}.") from error
    if not all(isinstance(key, str) for key, _ in pairs):
        raise UserError(f"--config {path} is no YAML of settings, like `port: 8000`.")
    return pairs


def _value(where: str, value: Any, parameter: Any, negated: bool) -> Any:
    """What the option's own parser takes. Raises `UserError`."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false.")
        return value != negated
    if isinstance(value, list) and not parameter.multiple:
        raise UserError(f"{where} takes one value, not a list.")
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool | dict | list) or each is None for each in values):
        raise UserError(f"{where} must be a text or a number.")
    texts = [str(each) for each in values]
    return texts if parameter.multiple else texts[0]
