"""Whether it fits, and what a person is told if it does not."""

from dataclasses import replace

import pytest

from flows.errors import DoesNotFitError
from flows.reports.cost import HEADROOM, CostEstimate, require_fits

GB = 10**9
ESTIMATE = CostEstimate(
    store_root="/data/store",
    profile="lossless",
    num_samples=2000,
    num_tokens=2_000_000,
    num_supervised_tokens=1_000_000,
    num_shards=100,
    missing_samples=1000,
    missing_tokens=1_000_000,
    stored_bytes=0,
    bytes_per_token={"raw": 30_000.0, "lossless": 20_000.0, "int8": 10_000.0},
    tokens_per_second=100.0,
    device="cpu",
    free_bytes=None,
    budget_bytes=None,
)


def test_sizes_and_time_are_of_what_is_still_to_be_made() -> None:
    assert ESTIMATE.size("lossless") == int(20 * GB * HEADROOM)
    assert ESTIMATE.seconds == 10_000
    assert replace(ESTIMATE, missing_tokens=0, bytes_per_token={}).seconds == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"free_bytes": 21 * GB},
        {"budget_bytes": 21 * GB},
        {"budget_bytes": 31 * GB, "stored_bytes": 10 * GB},
        {"free_bytes": 0, "budget_bytes": 1, "missing_tokens": 0, "bytes_per_token": {}},
    ],
)
def test_what_fits_passes(changes: dict[str, object]) -> None:
    require_fits(replace(ESTIMATE, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"free_bytes": 15 * GB},
            (
                r"about 20\.4 GB, but only 15\.0 GB are free at /data/store: short by 5\.4 GB; "
                r"nothing was computed\. You can: free disk space, or move the store "
                r"\(store\.root\); use fewer conversations \(about 735 of 1,000 fit: "
                r"dataset\.max_conversations\).*"
                r"set store\.profile=int8 \(10\.2 GB\)$"
            ),
        ),
        (
            {"budget_bytes": 25 * GB, "stored_bytes": 10 * GB},
            (
                r"10\.0 GB are already stored and the budget is 25\.0 GB: short by 5\.4 GB;.*"
                r"raise the budget \(store\.budget\).*\(dataset\.max_length\)$"
            ),  # its profile is settled
        ),
        ({"free_bytes": 5 * GB, "budget_bytes": 100 * GB}, r"5\.0 GB are free.*short by 15\.4 GB"),
        ({"free_bytes": 100 * GB, "budget_bytes": 5 * GB}, r"budget is 5\.0 GB.*short by 15\.4 GB"),
        (
            {
                "free_bytes": 9 * GB,
                "bytes_per_token": {"lossless": 20_000.0, "int8 + recompute": 5_000.0},
            },
            r"set store\.profile=int8 and store\.recompute=true \(5\.1 GB\)$",
        ),
        ({"free_bytes": 1}, r"short by 20\.4 GB.*\(store\.root\)$"),  # no remedy would help
    ],
)
def test_what_does_not_fit_says_how_much_is_missing_and_what_helps(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DoesNotFitError, match=message):
        require_fits(replace(ESTIMATE, **changes))
