"""Numbers are printed with three digits and never as 1000 of a unit."""

import pytest

from transmamba.report import format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.5, "1.00 kB"),
        (589_824, "590 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (99_960_000, "100 MB"),
        (2.5e9, "2.50 GB"),
        (7e18, "7000 PB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (0.25, "0.25"), (1_372_000, "1.37 M"), (-1500, "-1.50 k")])
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (312, "5 min 12 s"),
        (3599.9, "1 h 0 min"),
        (11_100, "3 h 5 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
