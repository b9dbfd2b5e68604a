"""Which GPUs are ours to use."""

from __future__ import annotations

import pytest

from tuneship.core.hardware import visible

UUIDS = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-cc", [2]),
        ("GPU-cc33,0", [2, 0]),
        ("GPU-a", []),  # means two
        ("0,7,1", [0]),  # all after the first that is not there are gone
    ],
)
def test_what_cuda_visible_devices_means(wanted: str, found: list[int]) -> None:
    assert visible(wanted, UUIDS) == found
