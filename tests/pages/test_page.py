"""The page by itself: everything is escaped, nothing is loaded, volumes keep their places, and a browser shows it all."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from chromium import Tab, browser, browser_path
from medlore.errors import DataError, InputError
from medlore.pages import Facts, Interval, Notes, Page, Picture, Section, Slices, Table, page_html, slices_of, write_page

RED, BLUE = (255, 0, 0), (0, 0, 255)
NASTY = '<script>alert("x")</script>&amp;"\''
needs_browser = pytest.mark.skipif(browser_path() is None, reason="no Chromium on this machine: the page was not opened")


def head(shape: tuple[int, int, int] = (20, 24, 16)) -> np.ndarray:
    """A bright block that fills one corner of each plane."""
    image = np.zeros(shape, np.float32)
    image[2:8, 3:9, 4:10] = 100
    return image


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def unpack(slices: Slices, name: str) -> np.ndarray:
    payload = slices.data()
    kind = np.uint8 if name == "image" or payload["bytes"] == 1 else np.dtype("<u2")
    return np.frombuffer(gzip.decompress(base64.b64decode(payload[name])), kind).reshape(slices.shape, order="F")


# -- HTML --------------------------------------------------------------------------------------------------------------


def png(path: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(path)
    return path


def every_piece(tmp_path: Path, name: str) -> Page:
    image = head()
    slices = slices_of(image, np.eye(4), [(name, image > 50)], colours=[RED])
    table = Table((name, "n"), [(name, 1), ("b", None)], title=name, note=name, folded=True)
    pieces = [Facts({name: name}, title=name), table, Notes([name]), Picture.from_file(png(tmp_path / "a.png"), name), slices]
    return Page(name, [Section(name, pieces)], subtitle=name, facts={name: name})


def test_no_value_becomes_markup(tmp_path: Path) -> None:
    html = page_html(every_piece(tmp_path, NASTY))
    assert NASTY not in html
    assert 'alert("x")' not in html
    assert html.count("<script") == html.count("</script>") == 3  # the data of the viewer and the two scripts of ours
    payload = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL).group(1))
    assert payload["labels"][0]["name"] == NASTY


def test_the_policy_allows_these_texts_alone(tmp_path: Path) -> None:
    html = page_html(every_piece(tmp_path, "plain"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1).replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in html.replace("http-equiv", "")


def test_numbers_intervals_and_gaps() -> None:
    rows = [("a", Interval(0.5, 0.25, 0.75), 1234, 0.125), ("b", Interval(None), 5, None)]
    html = page_html(Page("t", [Section("s", [Table(("name", "score", "count", "share"), rows)])]))
    for text in ("0.500 (0.250 to 0.750)", "not defined", "1,234", "0.125", "–"):
        assert f"<span>{text}</span>" in html
    assert 'x1="25.0" x2="75.0"' in html
    differences = [("a", Interval(-0.5, -1.0, 0.0)), ("b", Interval(1.0, 0.5, 1.0))]
    html = page_html(Page("t", [Section("s", [Table(("name", "difference"), differences)])]))
    assert 'class="zero" x1="50.0"' in html


def test_sections_without_pieces_are_left_out() -> None:
    html = page_html(Page("t", [Section("empty one", []), Section("full one", [Notes(["a"])])]))
    assert "empty one" not in html
    assert "full one" in html


def test_pictures_are_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(DataError, match="neither PNG nor JPEG"):
        Picture.from_file(tmp_path / "a.png", "a")
    with pytest.raises(InputError, match="no such file"):
        Picture.from_file(tmp_path / "b.png", "b")


# -- volumes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["RAS", "LPS", "SAR", "ILP"])
def test_every_orientation_is_turned_to_ras_with_its_masks(code: str) -> None:
    ras = nib.Nifti1Image(head(), np.array([[2.0, 0, 0, -10], [0, 1, 0, 5], [0, 0, 3, 7], [0, 0, 0, 1]]))
    ornt = nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(code))
    turned = ras.as_reoriented(ornt)
    array = np.asarray(turned.dataobj)
    slices = slices_of(array, turned.affine, [("block", array > 50)], colours=[RED])
    np.testing.assert_allclose(slices.affine, ras.affine, atol=1e-9)
    np.testing.assert_array_equal(slices.codes, (head() > 50).astype(np.uint8))
    np.testing.assert_array_equal(slices.levels[slices.image], head())
    assert slices.labels[0].volume_ml == pytest.approx(216 * 6 / 1000)
    assert head()[slices.labels[0].centre] == 100
    np.testing.assert_array_equal(unpack(slices, "codes"), slices.codes)
    np.testing.assert_array_equal(unpack(slices, "image"), slices.image)


def test_overlapping_labels_keep_all_their_voxels() -> None:
    shape = (20, 24, 16)
    masks = {"large": box(shape, (0, 12), (0, 12), (0, 12)), "small": box(shape, (8, 14), (8, 14), (8, 14)), "empty": box(shape, (0, 0))}
    masks["middle"] = box(shape, (4, 13), (4, 13), (4, 13))
    slices = slices_of(head(), np.eye(4), masks.items(), colours=[RED, BLUE])
    for number, (name, mask) in enumerate(masks.items()):
        inside = np.array([number in labels for labels in slices.sets])
        np.testing.assert_array_equal(inside[slices.codes], mask, err_msg=name)
    sizes = [label.voxels for label in slices.labels]
    assert all([sizes[n] for n in labels] == sorted(sizes[n] for n in labels) for labels in slices.sets)
    assert slices.labels[2].centre is None
    assert [label.colour for label in slices.labels] == [RED, BLUE, RED, BLUE]


def test_more_than_255_sets_need_two_bytes() -> None:
    shape = (300, 2, 2)
    masks = [(str(n), box(shape, (n, n + 1), (0, 2), (0, 2))) for n in range(300)]
    slices = slices_of(np.zeros(shape), np.eye(4), masks, colours=[RED])
    assert slices.data()["bytes"] == 2
    np.testing.assert_array_equal(unpack(slices, "codes")[:, 0, 0], np.arange(1, 301))


def test_large_volumes_are_thinned_and_the_page_says_so() -> None:
    shape = (41, 30, 9)
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    i, j, k = np.indices(shape)
    image = (i + j + 10 * k).astype(np.float32)  # linear: a mean of a block is the value at its middle
    mask = box(shape, (10, 30), (10, 30), (0, 9))
    slices = slices_of(image, affine, [("m", mask)], colours=[RED], voxel_limit=2000)
    assert np.prod(slices.shape) <= 2000
    assert "blocks of 3 × 3 × 1 voxels" in slices.notes[0]
    assert slices.labels[0].volume_ml == pytest.approx(mask.sum() * 4 / 1000)
    x, y, z = 5, 4, 3
    mm = (slices.affine @ [x, y, z, 1])[:3]
    assert slices.levels[slices.image[x, y, z]] == pytest.approx(mm[0] + mm[1] + 10 * mm[2] / 4, abs=0.6)
    edge = slices_of(image, affine, [], colours=[RED], voxel_limit=int(np.prod(shape)))
    assert edge.shape == shape
    assert not edge.notes


def test_ct_keeps_soft_tissue_fine_and_odd_numbers_do_no_harm() -> None:
    image = np.full((8, 8, 8), -1000.0)
    image[2:6, 2:6, 2:6] = 42
    image[0, 0, 0] = np.nan
    image[7, 7, 7] = np.inf
    slices = slices_of(image, np.eye(4), [], colours=[RED])
    assert slices.unit == "HU"
    assert slices.levels[slices.image[3, 3, 3]] == pytest.approx(42, abs=2)
    assert set(slices.windows) == {"soft tissue", "lung", "bone", "brain"}
    page_html(Page("t", [Section("s", [slices])]))  # strict JSON: a NaN in it would be an error
    blank = slices_of(np.full((4, 4, 4), np.nan), np.eye(4), [], colours=[RED])
    page_html(Page("t", [Section("s", [blank])]))


def test_masks_of_another_grid_are_refused() -> None:
    with pytest.raises(DataError, match=r"liver: a mask of shape \(3, 3, 3\)"):
        slices_of(head(), np.eye(4), [("liver", np.zeros((3, 3, 3)))], colours=[RED])


def test_oblique_grids_are_named() -> None:
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, 0, 0), [0, 0, 0])
    assert "oblique" in slices_of(head(), turn, [], colours=[RED]).notes[0]


# -- the browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as opened:
        yield opened


@pytest.fixture
def opened(tab: Tab, tmp_path: Path) -> Iterator[Tab]:
    """A page with two overlapping labels, one of them with a hostile name."""
    shape = (20, 24, 16)
    masks = [
        ("left half", box(shape, (0, 10), (0, 24), (0, 16))),
        (NASTY, box(shape, (2, 8), (3, 9), (4, 10))),
        ("none", box(shape, (0, 0))),
    ]
    affine = np.array([[2.0, 0, 0, -10], [0, 2, 0, 5], [0, 0, 2, 7], [0, 0, 0, 1]])
    slices = slices_of(head(shape), affine, masks, colours=[RED, BLUE])
    table = Table(("label", "Dice", "n"), [("b", Interval(0.5, 0.4, 0.6), 10), ("a", Interval(0.25, 0.2, 0.3), 9), ("c", None, None)])
    page = Page("A page", [Section("Slices", [slices]), Section("Scores", [table, Facts({"name": NASTY})])])
    tab.console.clear()
    tab.requests.clear()
    tab.open(write_page(page, tmp_path / "page.html"))
    tab.until("document.querySelector('.slices').dataset.ready === 'yes'")
    yield tab
    assert [line for line in tab.console if "getImageData" not in line] == []  # the tests themselves read pixels
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in tab.requests if url.startswith("file:")]) == 1


def pixel(tab: Tab, plane: str, right: float, down: float) -> list[int]:
    """Colour at a share of the canvas."""
    script = f"""(() => {{ const c = document.querySelector("[data-plane={plane}] canvas");
        return [...c.getContext("2d").getImageData({right} * c.width, {down} * c.height, 1, 1).data].slice(0, 3); }})()"""
    return tab.run(script)


def click_canvas(tab: Tab, plane: str, right: float, down: float) -> None:
    place = tab.run(f"""(() => {{ const c = document.querySelector("[data-plane={plane}] canvas"); c.scrollIntoView();
        const b = c.getBoundingClientRect(); return [b.left + {right} * b.width, b.top + {down} * b.height]; }})()""")
    tab.click(*place)


def change(tab: Tab, selector: str, value: Any) -> None:
    what = f"e.checked = {json.dumps(value)}" if isinstance(value, bool) else f"e.value = {value}"
    tab.run(f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); {what};
        e.dispatchEvent(new Event("input")); e.dispatchEvent(new Event("change")); }})()""")


def readout(tab: Tab) -> str:
    return tab.run("document.querySelector('.readout').textContent")


@needs_browser
def test_a_click_moves_the_crosshair_to_that_point_in_mm(opened: Tab) -> None:
    # the longest side (y, 24 voxels of 2 mm) fills the canvas; axial: x across, y up
    click_canvas(opened, "axial", 0.5, 0.5)
    first = readout(opened)
    at = (4 + 0.5, 6 + 0.5)  # voxel x 4, y 6: inside the block
    click_canvas(opened, "axial", (at[0] + 2) / 24, 1 - at[1] / 24)
    shown = readout(opened)
    assert shown != first
    assert "x −2.0  y 17.0 " in shown
    click_canvas(opened, "coronal", (at[0] + 2) / 24, 1 - (5 + 0.5 + 4) / 24)
    shown = readout(opened)
    assert "x −2.0  y 17.0  z 17.0 mm" in shown
    assert "value 100" in shown
    assert NASTY in shown  # as text: the smallest label first
    assert shown.index(NASTY) < shown.index("left half")
    outputs = opened.run("[...document.querySelectorAll('.planes output')].map(e => e.textContent)")
    assert outputs == ["6 / 16", "7 / 24", "5 / 20"]


@needs_browser
def test_overlays_sides_window_and_keys_change_the_picture(opened: Tab) -> None:
    change(opened, "[data-set=cross]", False)
    inside, outside, right = ((4.5 + 2) / 24, 1 - 6.5 / 24), ((4.5 + 2) / 24, 1 - 20.5 / 24), ((15.5 + 2) / 24, 1 - 6.5 / 24)
    change(opened, "[data-plane=axial] input", 5)
    red_green_blue = pixel(opened, "axial", *inside)
    assert red_green_blue[2] > red_green_blue[0]  # blue lies on top
    opened.run("document.querySelectorAll('.labels input')[1].click()")
    hidden = pixel(opened, "axial", *inside)
    assert hidden[0] > hidden[2]  # the larger label comes out from under it
    assert pixel(opened, "axial", *outside)[0] > 80
    opened.run("document.querySelector('[data-act=none]').click()")
    assert pixel(opened, "axial", *outside) == [0, 0, 0]
    assert pixel(opened, "axial", *inside) == [255, 255, 255]
    change(opened, "[data-set=high]", 255)
    change(opened, "[data-set=low]", 200)
    assert pixel(opened, "axial", *right) == [0, 0, 0]
    change(opened, "[data-set=mirror]", True)
    assert pixel(opened, "axial", *inside) == [0, 0, 0]
    assert pixel(opened, "axial", 1 - inside[0], inside[1]) == [255, 255, 255]
    opened.run("document.querySelector('[data-plane=axial] canvas').focus()")
    before = opened.run("document.querySelector('[data-plane=axial] output').textContent")
    for kind in ("keyDown", "keyUp"):
        opened.call("Input.dispatchKeyEvent", type=kind, key="PageUp", code="PageUp", windowsVirtualKeyCode=33)
    assert before == "6 / 16"
    assert opened.run("document.querySelector('[data-plane=axial] output').textContent") == "7 / 16"


@needs_browser
def test_opacity_outlines_zoom_and_going_to_a_label(opened: Tab) -> None:
    change(opened, "[data-set=cross]", False)
    middle = ((2 + 2.5) / 24, 1 - 12.5 / 24)
    change(opened, "[data-set=opacity]", 100)
    assert pixel(opened, "axial", *middle) == [255, 0, 0]
    change(opened, "[data-set=outline]", True)
    assert pixel(opened, "axial", *middle) == [0, 0, 0]
    assert pixel(opened, "axial", (2 + 9.5) / 24, middle[1]) == [255, 0, 0]  # the rim at x 9
    change(opened, "[data-set=outline]", False)
    opened.run("document.querySelectorAll('.labels .name')[1].click()")
    assert NASTY in readout(opened)
    change(opened, "[data-set=zoom]", 8)
    assert pixel(opened, "axial", 0.5, 0.5) == [0, 0, 255]
    assert pixel(opened, "axial", 0.1, 0.3) == [0, 0, 255]  # 3 voxels fill the canvas
    assert opened.run("document.querySelectorAll('.labels .name')[2].disabled")
    assert opened.run("document.querySelectorAll('.labels .ml')[2].textContent") == "not found"
    assert opened.run("document.querySelectorAll('.labels .ml')[0].textContent") == f"{3840 * 8 / 1000:.1f} ml"


@needs_browser
def test_tables_show_and_sort_their_values(opened: Tab) -> None:
    column = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[{}].innerText.trim())"
    assert opened.run(column.format(1)) == ["0.500 (0.400 to 0.600)", "0.250 (0.200 to 0.300)", "–"]
    opened.run("document.querySelectorAll('th')[2].click()")
    assert opened.run(column.format(2)) == ["9", "10", "–"]  # as numbers, not as text
    opened.run("document.querySelectorAll('th')[2].click()")
    assert opened.run(column.format(2)) == ["10", "9", "–"]
    opened.run("document.querySelectorAll('th')[0].click()")
    assert opened.run(column.format(0)) == ["a", "b", "c"]
    assert opened.run("document.querySelector('.facts dd').textContent") == NASTY
    assert opened.run("document.title") == "A page"


@needs_browser
def test_hostile_script_in_the_page_is_stopped_by_the_policy(tab: Tab, tmp_path: Path) -> None:
    page = page_html(Page("t", [Section("s", [Notes(["a"])])]))
    bad = "<script>document.title = 'owned'</script><img src='https://example.org/a.png'><img src=x onerror=\"document.title='owned'\">"
    (tmp_path / "bad.html").write_text(page.replace("</main>", f"{bad}</main>"))
    tab.requests.clear()
    tab.console.clear()
    tab.open(tmp_path / "bad.html")
    assert tab.run("document.title") == "t"
    assert any("Content Security Policy" in line for line in tab.console)
