"""`eyas engines`: what serves a draft on this machine."""

import logging
import time
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deployments.cli.console import ERRORS, OUT, one_message
from eagle_core.errors import ConfigError

# Engines import torch: only the commands that need one import them.

engines = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The engines that serve a draft here."
)


@engines.command(name="list")
def list_engines(
    vllm_python: Annotated[
        str, typer.Option(help="The Python that has vLLM.")
    ] = ".venv-vllm/bin/python",
) -> None:
    """List the engines, and which of them are installed."""
    from eagle_core.serving.engines import find_engine  # noqa: PLC0415 (see above)
    from eagle_core.target.config import TargetConfig  # noqa: PLC0415 (see above)

    target = TargetConfig(name="any", model="any", vllm_python=vllm_python)
    table = Table("engine", "here", box=None, pad_edge=False)
    for name in ("llamacpp", "vllm"):
        try:
            found = find_engine(name, target).title
        except ConfigError as error:
            found = f"no: {str(error).removeprefix('target any: ')}"
        table.add_row(name, escape(found))
    OUT.print(table)


@engines.command()
def install(
    name: Annotated[str, typer.Argument(help="llamacpp.")],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--cmake", metavar="NAME=VALUE", help="Option of its build, such as GGML_CUDA=ON."
        ),
    ] = None,
) -> None:
    """Build an engine from its source package into the user's cache."""
    from eagle_core.serving.llamacpp import install as llamacpp  # noqa: PLC0415 (see above)

    with one_message():
        if name != "llamacpp":
            raise ConfigError(
                f"eyas builds llamacpp only, not {name}; vLLM is installed by pip into a Python of "
                "its own: see docs/guides/vllm.md"
            )
        pairs = [option.partition("=") for option in options or []]
        unclear = [
            option for option, (_, sign, _) in zip(options or [], pairs, strict=True) if not sign
        ]
        if unclear:
            raise ConfigError(f"--cmake {unclear[0]} is not NAME=VALUE")
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        started = time.monotonic()
        with ERRORS.status("building llama.cpp"):
            folder = llamacpp.install({key: value for key, _, value in pairs})
        OUT.print(f"llama.cpp is in {folder} ({time.monotonic() - started:.0f} s)", soft_wrap=True)
