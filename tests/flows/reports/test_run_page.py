"""A run's report: made by the flows from the run's own files, and complete in itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterType

from eagle_core.data.config import DatasetConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.evaluate import evaluate_flow
from flows.hidden_states import hidden_states
from flows.reports.run_page import write_run_page
from flows.reports.run_record import EVALUATION_NAME, REPORT_NAME
from flows.train import train_flow
from tests import needs
from tests.browser import browser_page

TRAINING = TrainingConfig(
    dtype="float32",
    draft_vocab_size=300,
    max_steps=12,
    batch_tokens=512,
    warmup_steps=2,
    held_out_every=4,
)
EVALUATION = EvaluationConfig(
    draft_tokens=3, num_prompts=6, max_new_tokens=12, max_turns=2, batch_prompts=3
)


def _image_keys() -> set[str | None]:
    """Return the keys of all images that the Prefect UI shows."""
    images = ArtifactFilter(type=ArtifactFilterType(any_=["image"]))
    with get_client(sync_client=True) as client:
        return {artifact.key for artifact in client.read_artifacts(artifact_filter=images)}


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real browser."""
    with browser_page(width=1200, height=900) as opened:
        yield opened


@pytest.mark.ui
@pytest.mark.server
@needs.CHROMIUM.mark()
@pytest.mark.usefixtures("prefect_server")
def test_a_browser_shows_the_whole_run_and_asks_nobody_for_anything(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig, page: Page
) -> None:
    home = str(tmp_path)
    states = hidden_states(target, dataset, store, home=home)
    trained = train_flow(target, dataset, store, TRAINING, home=home)
    path = trained.run_path / REPORT_NAME
    assert "Not measured yet: run the evaluate flow." in path.read_text()
    estimated = estimate_flow(target, dataset, store, TRAINING, EVALUATION, home=home).estimate
    found = evaluate_flow(target, dataset, TRAINING, EVALUATION, home=home)
    assert {"loss-tiny-facts-main", "tokens-tiny-facts-lengths"} <= _image_keys()
    assert found.estimate is not None
    assert found.estimate.acceptance_interval == estimated.acceptance_interval
    assert list(found.trained_by_group) == ["turn 1", "turn 2"]
    measured = found.trained

    requests: list[Request] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request))  # noqa: PLW0108 (it marks what it is given)
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(path.as_uri(), wait_until="networkidle")
    assert [request.url for request in requests] == [path.as_uri()]
    assert complaints == []

    page.locator("summary", has_text="training").click()
    text = page.inner_text("body")
    headline = f"{measured.acceptance_length:.2f} ({measured.acceptance_interval[0]:.2f} to"
    share = f"{states.stored_bytes / states.raw_bytes:.1%}"
    for expected in (
        "tiny-facts-main",
        headline,
        f"{estimated.acceptance_length:.2f} tokens per target forward",
        "acceptance length, turn 2",
        "(3 prompts at a time)",
        "6 of 6",
        f"{trained.figures.first_loss:.2f} → {trained.figures.loss:.2f}",
        share,
        states.snapshot_id,
        "learning_rate",
    ):
        assert expected in text
    drawn = page.get_by_role("img")
    assert drawn.evaluate_all("all => all.map(one => one.getAttribute('aria-label'))") == [
        "Acceptance by depth",
        "Loss",
        "Loss by TTT step",
        "Held-out acceptance length",
        "Held-out accuracy by TTT step",
        "Decoding speed",
        "Lengths",
        "Storage size",
    ]
    assert all(
        box["width"] > 300 and box["height"] > 80  # drawn, at a size that can be read
        for box in (plot.bounding_box() or {"width": 0, "height": 0} for plot in drawn.all())
    )
    assert "estimated from the store" in (drawn.first.text_content() or "")
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_what_a_recipe_says_is_text_not_markup(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(
        """{"title": "<b>run</b>", "source_id": "s", "bill": null,
        "configuration": {"dataset": {"name": "<script>alert(1)</script>", "subsets": ["a", "b"]}},
        "train": {"num_samples": 1, "num_tokens": 4, "num_supervised": 2, "length_edges": [4, 5],
        "length_counts": [1]}, "held_out": {"num_samples": 0, "num_tokens": 0, "num_supervised": 0,
        "length_edges": [0, 1], "length_counts": [0]}}"""
    )
    text = write_run_page(tmp_path).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<td>a, b</td>" in text
    assert "Nothing is stored" in text
    assert "1, with 4 tokens, 2 of them supervised (50.0%)" in text


def test_a_file_of_another_version_is_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / EVALUATION_NAME).write_text('{"trained": {}}')
    text = write_run_page(tmp_path).read_text()
    assert "evaluation.json was written by another version of Eyas" in text
    assert "Not measured yet: run the evaluate flow." in text


def test_a_run_that_has_only_begun_says_what_to_run(tmp_path: Path) -> None:
    text = write_run_page(tmp_path).read_text()
    assert "Not finished yet: run the train flow." in text
    assert "Not measured yet: run the evaluate flow." in text
