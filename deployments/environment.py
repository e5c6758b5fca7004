"""What must be in the environment before Prefect is imported. Telemetry is off unless asked for."""

import os

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def settle_environment() -> None:
    """Set Prefect's environment for a run in this process; what the user set stays.

    Prefect's own lines and tracebacks stay off the terminal; they still reach the server.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_SERVER_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    for name in ("NO_PROXY", "no_proxy"):  # a proxy for the web is none for this machine's servers
        known = [host for host in os.environ.get(name, "").split(",") if host]
        if "*" not in known:
            os.environ[name] = ",".join(dict.fromkeys([*known, *_LOOPBACK]))
