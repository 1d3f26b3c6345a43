"""The plot's files, and what is drawn where."""

from __future__ import annotations

import csv
from itertools import pairwise

import matplotlib
import pytest

from loras_bench.errors import UserError
from loras_bench.results.pareto import frontiers
from loras_bench.results.plots import draw, write_frontier_csv, write_pareto


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def test_one_panel_gives_three_pictures_and_a_csv(tmp_path, comparison):
    paths = write_pareto(frontiers(comparison), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["pareto.csv", "pareto.png", "pareto.svg", "pareto.pdf"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert paths[2].read_text().count("lora_s") >= 1  # text stays text
    assert paths[3].read_bytes().startswith(b"%PDF")
    assert matplotlib.rcParams["svg.fonttype"] == "path"  # the global settings are as they were


def test_the_same_records_give_the_same_files(tmp_path, comparison):
    first = write_pareto(frontiers(comparison), tmp_path / "a")
    second = write_pareto(frontiers(comparison), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_several_panels_give_a_picture_each_and_one_of_all(tmp_path, comparison, make_record):
    paths = write_pareto(frontiers([*comparison, make_record(device="CPU", joules=None)]), tmp_path)
    stems = [path.stem for path in paths if path.suffix == ".png"]
    assert len(stems) == 3
    assert stems[-1] == "pareto"
    assert stems[0].endswith("-cpu") and stems[0].startswith("pareto-wikitext-2-smollm2-135m-instruct")


def test_labels_cover_neither_each_other_nor_points(make_record):
    places = [(100, 10), (100.5, 10.01), (101, 9.9), (100.2, 10.2), (140, 9), (99.8, 10.05)]
    records = [make_record(f"arm_{i}", joules=x, quality=y) for i, (x, y) in enumerate(places)]
    figure = draw(frontiers(records))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    labels = [text for text in axes.texts if text.get_text().startswith("arm_")]
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(label) for label in labels]
    assert len(boxes) == len(places)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        for x, y in places:
            assert not box.contains(*axes.transData.transform((x, y)))
        assert axes.get_window_extent().contains(*box.min) and axes.get_window_extent().contains(*box.max)


def test_the_front_is_a_staircase_through_front_arms_only(comparison):
    axes = draw(frontiers(comparison)).axes[0]
    (line,) = [line for line in axes.lines if len(line.get_xdata()) > 3]
    corners = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    lora_s, full = (10200 * 3.005 / 3e3, 11.8 * 3.005 / 3), (13000 * 3.005 / 3e3, 10.53 * 3.005 / 3)
    assert corners[1] == pytest.approx(lora_s)
    assert corners[2] == pytest.approx((full[0], lora_s[1]))
    assert corners[3] == pytest.approx(full)
    assert all(a == pytest.approx(c) or b == pytest.approx(d) for (a, b), (c, d) in pairwise(corners))


def test_title_device_budget_and_seeds_are_on_the_picture(comparison):
    shown = " ".join(texts(draw(frontiers(comparison)))).replace("\n", " ")
    for part in ("Test perplexity against train energy", "NVIDIA H100 80GB HBM3", "2,500,000 tokens", "n = 3 seeds"):
        assert part in shown


def test_the_fallback_is_on_the_picture(make_record):
    shown = " ".join(texts(draw(frontiers([make_record(joules=None)]))))
    assert "FLOPs (no measured joules)" in shown
    assert "no GPU energy counter on this machine" in shown
    assert "run-to-run noise unknown" in shown


def test_the_csv_has_the_verdicts_in_full_precision(tmp_path, comparison):
    path = write_frontier_csv(frontiers(comparison), tmp_path / "front.csv")
    rows = {row["arm"]: row for row in csv.DictReader(path.open())}
    assert rows["lora"]["dominated_by"] == "full"
    assert (rows["full"]["on_front"], rows["lora"]["on_front"]) == ("True", "False")
    (frontier,) = frontiers(comparison)
    for arm in frontier.arms:
        row = rows[arm.arm.label]
        assert (float(row["x_mean"]), float(row["x_ci_low"])) == (arm.x.mean, arm.x.low)
        assert (row["x"], row["x_unit"], row["y"]) == ("train_energy_j", "J", "perplexity")


def test_nothing_to_draw(tmp_path, make_record):
    with pytest.raises(UserError, match="nothing to plot"):
        write_pareto(frontiers([make_record(status="failed", reason="NaN")]), tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_users(comparison, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        write_pareto(frontiers(comparison), tmp_path / "file")
