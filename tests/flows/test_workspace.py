"""Where things lie."""

from pathlib import Path

from flows.workspace import Workspace


def test_a_tilde_is_the_users_own_folder() -> None:
    space = Workspace.at("~/eyas", target="t", dataset="d")
    assert space.store_root == Path.home() / "eyas" / "stores" / "t-d"
