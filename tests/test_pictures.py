"""Pictures: who covers whom, where a border lies, and that text from files stays text."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pathfm.pictures import (
    COLOURS,
    Series,
    jpeg_data_uri,
    line_plot_svg,
    mosaic,
    mpp_colour,
    nice_ticks,
    outline,
    told_apart,
)


def test_the_outline_is_the_border_of_the_mask_on_a_picture_that_is_not_square() -> None:
    thumbnail = np.full((40, 60, 3), 255, np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:25] = True  # covers rows 10-29 and columns 20-49 of the thumbnail
    drawn = np.asarray(outline(thumbnail, mask, "#ff0000", width_px=1))
    red = (drawn == [255, 0, 0]).all(axis=2)
    expected = np.zeros((40, 60), bool)
    expected[10:30, 20:50] = True
    expected[11:29, 21:49] = False
    np.testing.assert_array_equal(red, expected)


def test_a_mosaic_has_room_for_every_picture() -> None:
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(7)]
    sheet = mosaic(images, ["0.5 µm/px"] * 7, columns=3, tile_px=32)
    assert sheet.size == (3 * 36 + 4, 3 * 50 + 4)
    assert sheet.getpixel((4 + 16, 4 + 50 + 16)) == (3, 3, 3)
    assert mosaic([]).size == (136, 136)


def test_a_data_uri_is_a_jpeg_of_the_size_asked_without_metadata() -> None:
    source = Image.fromarray(np.zeros((100, 300, 3), np.uint8))
    source.info["comment"] = b"patient name"
    head, data = jpeg_data_uri(source, max_px=150).split(",")
    assert head == "data:image/jpeg;base64"
    raw = base64.b64decode(data)
    assert Image.open(io.BytesIO(raw)).size == (150, 50)
    assert b"patient" not in raw


def test_a_plot_is_wellformed_escapes_names_and_leaves_out_what_is_not_finite() -> None:
    nan = float("nan")
    series = [Series("<script>", range(5), [1.0, nan, 3.0, 2.0, 9.0]), Series("b&c", [], [])]
    svg = line_plot_svg(series, "step", "lo<ss")
    assert "nan" not in svg
    assert "<script>" not in svg
    root = ElementTree.fromstring(svg)
    (line,) = [item for item in root.iter() if item.tag.endswith("polyline")]
    assert len(line.attrib["points"].split()) == 4
    assert ElementTree.fromstring(line_plot_svg([])) is not None


def test_a_smoothed_line_is_the_centred_running_mean() -> None:
    svg = line_plot_svg([Series("a", range(9), [0, 9] * 4 + [0])], smooth=3)
    lines = [i for i in ElementTree.fromstring(svg).iter() if i.tag.endswith("polyline")]
    raw, smooth = (line.attrib["points"].split() for line in lines)
    assert len(smooth) == 7
    assert smooth[0].split(",")[0] == raw[1].split(",")[0]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_reach_around_the_data(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 9
    slack = 1e-6 * max(abs(low), span, 1e-3)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack


def test_equal_resolutions_have_equal_colours() -> None:
    mpps = [0.25, 1.0, 0.5, 1.0]
    assert mpp_colour(1.0, mpps) == mpp_colour(1.0, [*mpps, 0.25])
    assert len({mpp_colour(m, mpps) for m in mpps}) == 3
    assert len(set(COLOURS)) == len(COLOURS)


def test_ticks_of_a_constant_line_do_not_divide_by_zero() -> None:
    assert len(nice_ticks(2.0, 2.0)) >= 2
    assert nice_ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_names_that_end_differently_stay_distinct_and_so_do_those_that_differ_in_the_middle() -> (
    None
):
    long = [f"TCGA-A1-A0SP-01Z-00-DX{n}.20D689C6-EFA5-4694-BE76-24475A89ACC{n}" for n in (1, 2)]
    middle = [f"{'a' * 40}{n}{'b' * 40}" for n in (1, 2)]
    shown = told_apart([*long, *middle, "short"])
    assert len(set(shown.values())) == 5
    assert shown["short"] == "short"
    assert shown[long[0]].startswith("TCGA")
    assert shown[long[0]].endswith("ACC1")


def test_a_mosaic_has_room_for_a_title_and_lines_of_a_caption() -> None:
    one = [np.zeros((32, 32, 3), np.uint8)]
    low, high = mosaic(one, ["a"], tile_px=32), mosaic(one, ["a\nb"], tile_px=32, title="first")
    assert high.height - low.height == 12 + 16
