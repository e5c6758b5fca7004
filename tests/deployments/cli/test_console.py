"""What a command says when it is stopped, and how it ends."""

import signal
from collections.abc import Iterator

import pytest
import typer

from deployments.cli.console import INTERRUPTED, one_message


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("wanted", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["stopped", "stopped; begin again"])
def test_a_stopped_command_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], wanted: signal.Signals, what: str
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(typer.Exit) as ended, one_message(stopped=what):
            signal.raise_signal(wanted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.exit_code == INTERRUPTED
    assert capsys.readouterr().err == f"{what}\n"


def test_a_file_that_the_system_refuses_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), one_message():
        raise PermissionError(13, "Permission denied", "/data/[runs]")
    assert capsys.readouterr().err == "PermissionError: Permission denied: /data/[runs]\n"
    with pytest.raises(ConnectionResetError), one_message():
        raise ConnectionResetError
