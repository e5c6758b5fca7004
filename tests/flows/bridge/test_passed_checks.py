"""A check that passed is repeated only where it could say something else."""

import shutil
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.chat_template import PLAIN_TEMPLATE
from flows.bridge import passed_checks
from flows.bridge.passed_checks import TargetCheck, require_passed


@pytest.fixture
def own(tmp_path: Path, target: TargetConfig) -> TargetConfig:
    folder = shutil.copytree(target.model, tmp_path / "target")
    return target.model_copy(update={"model": str(folder)})


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the targets that were checked, in order."""
    names: list[str] = []
    check_target = passed_checks.check_target

    def count(target: TargetConfig, **how: bool) -> None:
        names.append(target.name)
        check_target(target, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(passed_checks, "check_target", count)
    return names


def check(
    target: TargetConfig,
    *,
    max_length: int | None = None,
    runs_here: bool = True,
    rolls_back: bool = False,
) -> TargetCheck:
    return TargetCheck(
        target=target, max_length=max_length, runs_here=runs_here, rolls_back=rolls_back
    )


def test_a_wider_check_includes_a_narrower_one(own: TargetConfig, checked: list[str]) -> None:
    require_passed(check(own, max_length=256, rolls_back=True))
    require_passed(check(own, max_length=256, rolls_back=True))
    require_passed(check(own, max_length=128))
    require_passed(check(own, runs_here=False, rolls_back=True))
    assert len(checked) == 1
    with pytest.raises(ConfigError, match="max_length is 513"):
        require_passed(check(own, max_length=513))
    assert len(checked) == 2


@pytest.mark.parametrize("wider", [{"max_length": 256}, {"rolls_back": True}, {"runs_here": True}])
def test_a_narrower_check_does_not_include_a_wider_one(
    own: TargetConfig, checked: list[str], wider: dict[str, int]
) -> None:
    require_passed(check(own, max_length=128, runs_here=False))
    require_passed(check(own, **{"max_length": 128, "runs_here": False, **wider}))  # type: ignore[arg-type]
    require_passed(check(own.model_copy(update={"name": "other"}), runs_here=False))
    assert checked == ["tiny", "tiny", "other"]


def test_a_changed_file_is_checked_again_and_a_failure_is_not_remembered(
    own: TargetConfig, checked: list[str]
) -> None:
    require_passed(check(own))
    path = Path(own.model) / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"num_hidden_layers": 8', '"num_hidden_layers": "8"'))
    for _ in range(2):
        with pytest.raises(ConfigError):
            require_passed(check(own))
    path.write_text(before)
    require_passed(check(own))
    assert len(checked) == 4


def test_a_template_in_a_file_elsewhere_is_checked_again_when_it_changes(
    own: TargetConfig, checked: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(PLAIN_TEMPLATE)
    configured = own.template.model_copy(update={"chat_template": str(path)})
    target = own.model_copy(update={"template": configured})
    for _ in range(2):
        require_passed(check(target))
    assert len(checked) == 1
    path.write_text(PLAIN_TEMPLATE + "{% if %}")
    for _ in range(2):
        with pytest.raises(ConfigError, match="not valid Jinja"):
            require_passed(check(target))
    path.unlink()
    with pytest.raises(ConfigError, match="neither Jinja text nor a file"):
        require_passed(check(target))
