"""`watch` compares content: what changes it sees, and that it is quiet once they are built."""

import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from eagle_core.data.build import build_dataset
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from flows.watch import SourceChange, check_source
from flows.workspace import Workspace
from tests import tiny


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(home=tmp_path / "home", target="", dataset="facts")


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return tiny.write_conversations(folder / "a.json", 20)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        pass


@pytest.fixture
def url(data_path: Path) -> Iterator[str]:
    """The same file over HTTP."""
    handler = functools.partial(_Quiet, directory=str(data_path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{data_path.name}"
        server.shutdown()


def looked(source: str | Path, space: Workspace) -> SourceChange | None:
    with disable_run_logger():
        return check_source.fn(DatasetConfig(name="facts", source=str(source)), space)


def built(source: str | Path, space: Workspace) -> None:
    config = DatasetConfig(name="facts", source=str(source))
    build_dataset(config, out_dir=space.dataset_path)


def test_a_data_set_that_was_never_built_is_new(data_path: Path, space: Workspace) -> None:
    change = looked(data_path, space)
    assert change is not None
    assert change.built_from == ()
    assert len(change.new) == 1
    assert change.new[0].startswith("a.json ")


def test_what_is_built_is_reported_no_more(data_path: Path, space: Workspace) -> None:
    built(data_path, space)
    assert looked(data_path, space) is None
    data_path.touch()  # another date, the same content
    assert looked(data_path, space) is None


def test_a_change_is_reported_until_it_is_built(data_path: Path, space: Workspace) -> None:
    built(data_path, space)
    records = json.loads(data_path.read_text())
    first = records[0]["conversations"][0]
    first["value"] = first["value"].swapcase()  # as many bytes as before
    data_path.write_text(json.dumps(records))
    for _ in range(2):
        change = looked(data_path, space)
        assert change is not None
        assert change.new == change.found != change.built_from
    built(data_path, space)
    assert looked(data_path, space) is None


def test_a_new_file_of_a_glob_is_seen(data_path: Path, space: Workspace) -> None:
    pattern = data_path.parent / "*.json"
    built(pattern, space)
    tiny.write_conversations(data_path.parent / "b.json", 3, first=50)
    change = looked(pattern, space)
    assert change is not None
    assert [line.split()[0] for line in change.new] == ["b.json"]


def test_a_url_is_seen_to_change(url: str, data_path: Path, space: Workspace) -> None:
    built(url, space)
    assert looked(url, space) is None
    tiny.write_conversations(data_path, 21)
    assert looked(url, space) is not None


def test_a_source_that_is_gone_is_an_error(data_path: Path, space: Workspace) -> None:
    built(data_path, space)
    data_path.unlink()
    with pytest.raises(ConfigError, match=r"no file at .*a\.json"):
        looked(data_path, space)


def test_answers_of_a_target_have_no_source(space: Workspace) -> None:
    with pytest.raises(ConfigError, match="watch the data set of its questions"):
        looked("regenerated", space)
