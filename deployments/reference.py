"""Write the reference pages from the code: run `make generate`.

A test compares the committed pages with what this would write.
"""

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments.cli import app
from deployments.recipe import Recipe
from deployments.registry import FLOWS

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
_NOTE = "<!-- Written by deployments/reference.py: change the code, then run `make generate`. -->"


_ENTRY = re.compile(
    r"^    (\w+(?:, \w+)*): (.+?)(?=^    \w+(?:, \w+)*: |\Z)", re.MULTILINE | re.DOTALL
)


def pages() -> Mapping[str, str]:
    """Return the text of every reference page by its file name."""
    return {"cli.md": _cli(), "flows.md": _flows(), "recipe.md": _recipe()}


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def _page(title: str, lines: Iterator[str]) -> str:
    return "\n".join([f"# {title}", "", _NOTE, "", *lines]).rstrip("\n") + "\n"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _cli() -> str:
    return _page("Commands", _command_lines())


def _command_lines() -> Iterator[str]:
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="eyas")
    commands: Mapping[str, Any] = group.commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        usage = ["eyas", name, *(_argument(p) for p in command.params if _is_argument(p))]
        yield from (f"## eyas {name}", "", inspect.cleandoc(command.help or ""), "")
        yield from ("```", " ".join([*usage, "[OPTIONS]"]), "```", "")
        rows = [_parameter_row(p, context) for p in command.params if p.name != "help"]
        if rows:
            yield from ("| option | meaning |", "| --- | --- |", *rows, "")


def _is_argument(parameter: Any) -> bool:  # noqa: ANN401 (of click)
    return bool(parameter.param_type_name == "argument")


def _argument(parameter: Any) -> str:  # noqa: ANN401 (of click)
    name = str(parameter.name).upper()
    return name if parameter.required else f"[{name}]"


def _parameter_row(parameter: Any, context: typer.Context) -> str:  # noqa: ANN401 (of click)
    help_text = getattr(parameter, "help", None) or ""
    if _is_argument(parameter):
        names = f"`{_argument(parameter)}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
        names = ", ".join(f"`{name}{value}`" for name in parameter.opts)
    default = parameter.get_default(context)
    has_default = default not in (None, False, "", (), []) and not callable(default)
    shown = f" Default: `{default}`." if has_default else ""
    return f"| {names} | {_cell(help_text)}{shown} |"


def _flows() -> str:
    return _page("Flows", _flow_lines())


def _flow_lines() -> Iterator[str]:
    yield "`eyas run FLOW RECIPE` runs a flow here; `prefect deployment run FLOW/RECIPE` runs it on"
    yield "a worker. Its parameters are the listed sections of the [recipe](recipe.md), `home`, and"
    yield "those in the last column."
    yield ""
    yield "| flow | description | sections | other parameters |"
    yield "| --- | --- | --- | --- |"
    for entry in FLOWS:
        names = inspect.signature(entry.load().fn).parameters  # type: ignore[attr-defined]
        others = [name for name in names if name not in {*entry.sections, "home"}]
        yield (
            f"| `{entry.name}` | {_cell(entry.description)} | {', '.join(entry.sections)} | "
            f"{', '.join(f'`{name}`' for name in others)} |"
        )
    for entry in FLOWS:
        text = inspect.cleandoc(entry.load().fn.__doc__ or "")  # type: ignore[attr-defined]
        before, _, errors = text.partition("Raises:")
        summary, _, arguments = before.partition("Args:")
        yield from ("", f"## {entry.name}", "", summary.strip())
        for found, head in (
            (_ENTRY.findall(arguments), "| parameter | meaning |"),
            (_ENTRY.findall(errors), "| error | when |"),
        ):
            if found:
                yield from ("", head, "| --- | --- |")
                yield from (f"| `{name}` | {_cell(meaning)} |" for name, meaning in found)


def _recipe() -> str:
    return _page("Recipes", _recipe_lines())


def _recipe_lines() -> Iterator[str]:
    yield "A recipe is one YAML file with these sections. `--set SECTION.KEY=VALUE` of `eyas run`"
    yield "overrides one key. A key without a default is required. `null` means: not set."
    yield ""
    for section, field in Recipe.model_fields.items():
        yield from _section_lines(section, field)


def _section_lines(section: str, field: FieldInfo) -> Iterator[str]:
    model = field.annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)  # noqa: S101, PT018 (for types)
    yield from (f"## {section}", "", inspect.cleandoc(model.__doc__ or ""), "")
    yield from ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
    nested: dict[str, FieldInfo] = {}
    for key, one in model.model_fields.items():
        if isinstance(one.annotation, type) and issubclass(one.annotation, BaseModel):
            nested[f"{section}.{key}"] = one
            continue
        default = "" if one.is_required() else f"`{_default(one)}`"
        kind = _cell(", ".join([_type(one.annotation), *_bounds(one)]))
        meaning = _cell(one.description or "")
        yield f"| `{key}` | {kind} | {default} | {meaning} |"
    yield ""
    for name, one in nested.items():
        yield from _section_lines(name, one)


def _bounds(field: FieldInfo) -> Iterator[str]:
    for sign, name in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
        for constraint in field.metadata:
            if (bound := getattr(constraint, name, None)) is not None:
                yield f"{sign} {bound:g}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "null"
    if value == "":
        return '""'
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:  # noqa: ANN401 (any type)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if arguments:
        return " or ".join(_type(one) for one in arguments if one is not type(None))
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "groups of keys"
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, {"ByteSize": "bytes, such as 200GB"}.get(name, name))


if __name__ == "__main__":
    main()
