import numpy as np
import pytest
from PIL import Image

from online_patching.errors import MaskError
from online_patching.mask import QUANTILE_SIDES_UM, ForegroundMask

RNG = np.random.default_rng(5)
TISSUE = RNG.random((37, 53)) < 0.3


def mask(tissue=TISSUE, size=(5300, 3145), mpp=(0.5, 0.5)) -> ForegroundMask:
    return ForegroundMask.from_array(tissue, size, mpp)


def test_the_fraction_of_a_box_is_exact():
    m = mask()
    per_px0 = np.repeat(np.repeat(TISSUE, 85, axis=0), 100, axis=1)  # cells are 100 x 85 px0
    for _ in range(50):
        x, y = int(RNG.integers(-300, 5200)), int(RNG.integers(-300, 3100))
        w, h = int(RNG.integers(1, 900)), int(RNG.integers(1, 900))
        inside = per_px0[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)]
        assert m.fraction(x, y, w, h) == pytest.approx(inside.sum() / (w * h), abs=1e-9)


def test_tissue_points_are_the_cells_in_order_and_lie_within_them():
    m = mask()
    rows, columns = np.nonzero(TISSUE)
    for k in (0, 1, 100, m.tissue_cells - 1):
        x, y = m.tissue_point(k, 0.999999, 0.0)
        assert (int(x // 100), int(y // 85)) == (columns[k], rows[k])


def test_a_mask_survives_the_disk_and_is_a_picture(tmp_path):
    m = mask()
    m.save(tmp_path / "m.png")
    again = ForegroundMask.load(tmp_path / "m.png")
    assert again.digest == m.digest
    assert (np.asarray(Image.open(tmp_path / "m.png")) == TISSUE).all()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "huge"])
def test_a_damaged_mask_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "m.png"
    mask().save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif damage == "foreign":
        Image.new("1", (5, 5)).save(path)
    elif damage == "missing":
        path.unlink()
    else:
        Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(MaskError, match=r"not a readable mask"):
        ForegroundMask.load(path)


def test_area_and_share():
    m = mask()
    assert m.tissue_fraction == TISSUE.mean()
    assert m.tissue_area_um2 == pytest.approx(TISSUE.mean() * 5300 * 0.5 * 3145 * 0.5)


def test_a_needle_has_no_tissue_rich_box_at_a_coarse_field_of_view():
    needle = np.zeros((400, 400), bool)
    needle[:, 195:205] = True  # 80 µm wide at 8 µm a cell
    rich = ForegroundMask.from_array(needle, (6400, 6400), (0.5, 0.5)).rich_box_fractions()
    by_side = dict(zip(QUANTILE_SIDES_UM, rich, strict=True))
    assert by_side[64.0] == pytest.approx(1.0, abs=1e-6)
    assert by_side[512.0] == pytest.approx(80 / 512, abs=0.01)


def test_rich_fractions_agree_with_the_exact_fraction_of_such_boxes():
    m = mask()
    side_um = QUANTILE_SIDES_UM[8]
    rows, columns = np.nonzero(TISSUE)
    exact = []
    for r, c in zip(rows, columns, strict=True):
        side = side_um / 0.5
        x = np.clip((c + 0.5) * 100 - side / 2, 0, 5300 - side)
        y = np.clip((r + 0.5) * 85 - side / 2, 0, 3145 - side)
        exact.append(m.fraction(x, y, side, side))
    assert m.rich_box_fractions()[8] == pytest.approx(np.quantile(exact, 0.98), abs=1e-5)
