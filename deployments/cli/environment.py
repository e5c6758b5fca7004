"""The environment that Prefect needs before its import. Telemetry is off unless enabled."""

import os

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def settle_environment() -> None:
    """Set Prefect's environment for a run in this process; variables set by the user stay.

    Prefect's own log lines and tracebacks stay off the terminal; they still reach the server.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_SERVER_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # Servers on this machine must bypass a web proxy. Clients read the lower case first.
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    known = [host.strip() for host in excepted.split(",") if host.strip()]
    if "*" not in known:
        excepted = ",".join(dict.fromkeys([*known, *_LOOPBACK]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted
