"""`eyas serve`: the target of a run with its draft, on an engine's own server."""

import logging
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from deployments.cli.console import ERRORS, OUT, one_message
from deployments.cli.environment import settle_environment
from deployments.cli.run_argument import (
    Home,
    Overrides,
    RunArgument,
    RunNameOption,
    parameters_of,
)
from deployments.registry import SERVE
from eagle_core.errors import ConfigError
from flows.workspace import DEFAULT_HOME

if TYPE_CHECKING:
    from flows.tasks.serve import ServeOptions, Serving

# Engines import torch: they are imported when the command runs.

_ENGINES = ("vllm", "llamacpp", "sglang")
_HERE = ("127.0.0.1", "localhost")
_EXAMPLE = """\
curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "What is an eyas?"}}]}}'"""


def serve(  # noqa: PLR0917 (one parameter per option)
    run: RunArgument,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    run_name: RunNameOption = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="vllm, llamacpp, or sglang (only with --print); by default evaluation.engine, or "
            "the one that is installed here."
        ),
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the command for a shell, and start nothing.")
    ] = False,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Texts decoded at a time.")] = 4,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the longest text, prompt included; by default 4,096, or the target's "
            "positions if they are fewer.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=32,
            help="Tokens drafted per round; 0 serves the target alone. By default what `eyas "
            "bench` found fastest for so many texts, else evaluation.draft_tokens.",
        ),
    ] = None,
    p_min: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="llama.cpp: probability below which drafting stops in a round."
        ),
    ] = None,
) -> None:
    """Serve the target of a run with its draft, with OpenAI's API, until Ctrl-C.

    The draft of the best checkpoint is exported into the run's folder first.
    """
    with one_message():
        if engine is not None and engine not in _ENGINES:
            raise ConfigError(f"there is no engine {engine!r}; known: {', '.join(_ENGINES)}")
        own: dict[str, str] = {} if run_name is None else {"run": run_name}
        parameters = parameters_of(SERVE, run, overrides or [], home, own)
        settle_environment()
        from flows.tasks.serve import ServeOptions  # noqa: PLC0415 (see above)

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        options = ServeOptions(
            engine=engine,  # type: ignore[arg-type]  # checked above
            host=host,
            port=port,
            slots=slots,
            max_length=max_length,
            draft_tokens=draft_tokens,
            p_min=p_min,
        )
        (_print if only_print else _start)(SERVE.load()(**parameters, options=options), options)


def _print(planned: "Serving", options: "ServeOptions") -> None:
    from flows.tasks.serve import shell_command  # noqa: PLC0415 (see above)

    text, missing = shell_command(planned, port=options.port)
    _say(_what(planned))
    _warn_of_others(planned, options)
    if planned.served.draft is not None:
        _say(f"it needs the exported draft: {planned.served.draft}")
    for path in missing:
        _say(f"it needs {path}, which the first `eyas serve` without --print makes")
    OUT.print(text, soft_wrap=True, markup=False, highlight=False)


def _start(planned: "Serving", options: "ServeOptions") -> None:
    from flows.tasks.serve import start  # noqa: PLC0415 (see above)

    _say(_what(planned))
    _warn_of_others(planned, options)
    with start(planned, port=options.port) as server:
        name = planned.served.target.name
        OUT.print(f"serving {name} at {server.url}/v1; Ctrl-C ends it. Try:", soft_wrap=True)
        example = _example(planned, server.url)
        OUT.print(example, soft_wrap=True, markup=False, highlight=False)
        server.wait()


def _example(planned: "Serving", url: str) -> str:
    """Return a command that asks the server; of a key, it names the variable."""
    from flows.tasks.serve import key_variable  # noqa: PLC0415 (see above)

    key = key_variable(planned.engine)
    header = "" if key is None else f' -H "Authorization: Bearer ${key}" \\\n '
    return _EXAMPLE.format(url=url, name=planned.served.target.name, key=header)


def _warn_of_others(planned: "Serving", options: "ServeOptions") -> None:
    """Say that other machines may use the server, if they may, and need no key."""
    from flows.tasks.serve import KEY_VARIABLES, key_variable  # noqa: PLC0415 (see above)

    if options.host in _HERE or key_variable(planned.engine) is not None:
        return
    variable = KEY_VARIABLES.get(planned.engine)
    how = "add --api-key to the command" if variable is None else f"set {variable}"
    _say(f"whoever reaches {options.host} can use this server: {how} to ask for a key")


def _what(planned: "Serving") -> str:
    from flows.reports.engine_tables import setting_text  # noqa: PLC0415 (see above)

    setting = planned.setting
    what = "without the draft" if setting is None else setting_text(setting)
    return f"{planned.served.target.name} on {planned.engine}, {what} ({planned.reason})"


def _say(text: str) -> None:
    ERRORS.print(escape(text), soft_wrap=True, highlight=False)
