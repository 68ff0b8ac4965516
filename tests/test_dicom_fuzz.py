"""Hostile DICOM series: thousands in children with real limits; `benchmarks/fuzz_dicom.py` runs millions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from online_patching.errors import SlideError
from online_patching.formats import dicom
from online_patching.testing.hostile import HostileFile
from online_patching.testing.hostile_dicom import (
    FOLDER,
    HostileSeries,
    dicom_bombs,
    dicom_seeds,
    siblings,
)

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz_dicom.py"


def whole(name: str, data: bytes) -> HostileSeries:
    return HostileSeries(HostileFile(name, data, (), len(data)), siblings(name))


@pytest.mark.parametrize("seed", dicom_bombs(), ids=lambda seed: seed.name)
def test_structures_that_explode_are_refused_in_few_requests(seed) -> None:
    stores = whole(seed.name, seed.data)
    with pytest.raises(SlideError):
        dicom.read_index(FOLDER, "bomb", None, stores)
    assert stores.requests < 100


def test_the_seeds_are_what_they_are_meant_to_be() -> None:
    """All but one are slides, and their numbers are found: a fuzzer of what is refused anyway finds nothing."""
    refused = set()
    for seed in dicom_seeds():
        assert len(seed.fields) > 150
        try:
            assert dicom.read_index(FOLDER, "seed", None, whole(seed.name, seed.data))
        except SlideError:
            refused.add(seed.name)
    assert refused == {"label"}


@pytest.mark.slow
def test_hostile_series_end_in_a_result_or_an_error_of_ours() -> None:
    """Within a second of CPU and 256 MiB of address space each: the script's children see to that."""
    words = [sys.executable, str(SCRIPT), "--inputs", "10000", "--seed", "7"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "10,000 inputs" in done.stdout and "0 findings" in done.stdout
