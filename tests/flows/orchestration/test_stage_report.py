"""A stage prints its figures; a stage of another flow leaves that to the other."""

import pytest
from prefect import flow

from flows.orchestration.stage_report import report_stage

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


@flow
def a_stage() -> None:
    report_stage("A stage", [("figure", "17")], key="a-stage", following=[("next", "go on")])


@flow
def all_stages() -> None:
    a_stage()
    report_stage("All stages", [("sum", "18")], key="all-stages")


def test_a_stage_alone_prints_its_figures_and_what_comes_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    a_stage()
    printed = capsys.readouterr().out
    assert all(told in printed for told in ("A stage", "17", "go on"))


def test_a_stage_of_another_flow_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    all_stages()
    printed = capsys.readouterr().out
    assert "All stages" in printed
    assert "A stage" not in printed
