"""The documentation is of this code, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from deployments import reference
from tests.paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)


@pytest.mark.parametrize("name", reference.pages())
def test_a_reference_page_is_of_this_code(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == reference.pages()[name], "run: make generate"


def test_every_command_flow_and_key_is_there() -> None:
    pages = reference.pages()
    for command in (
        *("run", "plan", "doctor", "bench", "serve", "repair"),
        *("import-store", "inspect", "verify", "gc"),
    ):
        assert f"\n## eyas {command}\n" in pages["cli.md"]
    assert "| `--older-than HOURS` |" in pages["cli.md"]
    assert "| `hidden-states` |" in pages["flows.md"]
    assert "| `DoesNotFitError` |" in pages["flows.md"]
    assert "\n## target.template\n" in pages["recipe.md"]
    assert (
        "| `profile` | `lossless`, `int8`, `int6`, `int4`, `raw` | `lossless` |"
        in pages["recipe.md"]
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    """What `make docs` checks inside of docs/, for pages outside of it too."""
    path = ROOT / page
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link and not link.startswith("#"):
            assert (path.parent / Path(link.partition("#")[0])).exists(), link
