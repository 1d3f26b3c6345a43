"""Tables tell every number's origin and interval, and why a number is missing."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest

from loras_bench.errors import UserError
from loras_bench.results.formatting import format_difference, format_interval, format_number, format_ratio, scaled_unit
from loras_bench.results.quantities import Quantity
from loras_bench.results.record import Flops, Quality
from loras_bench.results.render import TERMINAL_WIDTH, escape_latex, render
from loras_bench.results.statistics import Interval
from loras_bench.results.tables import build_tables


def cells(table, arm):
    return next(row.cells for row in table.rows if row.arm.label == arm)


def test_the_numbers_of_an_arm(comparison):
    (table,) = build_tables(comparison)
    assert table.baseline == "full"
    lora_s = cells(table, "lora_s")
    assert lora_s["train_energy_j"].interval.mean == pytest.approx(10200 * 3.005 / 3)
    assert lora_s["train_energy_j_ratio"].interval.mean == pytest.approx(10200 / 13000)
    assert lora_s["test_perplexity_difference"].interval.mean == pytest.approx((11.80 - 10.53) * 3.005 / 3)
    assert lora_s["test_perplexity_dense_attention"].interval.mean == pytest.approx(11.28 * 3.005 / 3)
    assert cells(table, "lora")["test_perplexity_dense_attention"].interval is None
    assert cells(table, "lora")["trainable_percent"].interval.mean == pytest.approx(100 * 884736 / 134515008)


def test_panels_never_mix_devices_or_budgets(make_record):
    records = [make_record(), make_record(device="NVIDIA H200"), make_record(tokens=5_000_000, config_hash="b")]
    tables = build_tables(records)
    assert len(tables) == 3
    assert all(len(table.rows) == 1 for table in tables)
    epochs = build_tables([make_record(config={"training": {"epochs": 1.0}})])
    assert epochs[0].key.budget == "1 epoch"


def test_missing_energy_is_a_dash_with_the_reason(make_record):
    text = render(build_tables([make_record(), make_record("lora", joules=None)]))
    assert "– [a]" in text
    assert "[a] no GPU energy counter on this machine" in text
    assert " 0 " not in text.split("Energy:")[1].split("Time and memory:")[0]


def test_a_panel_without_joules_says_so(make_record):
    text = render(build_tables([make_record(joules=None)]))
    assert "No joules were measured on NVIDIA H100 80GB HBM3: no GPU energy counter on this machine." in text


def test_a_number_that_is_not_finite_is_missing(make_record):
    (table,) = build_tables([make_record(quality=float("inf"))])
    assert cells(table, "full")["test_perplexity"].missing == "perplexity is not a finite number"


def test_left_out_runs_are_listed_and_do_not_count(make_record):
    records = [make_record("lora", seed) for seed in (0, 1)]
    records += [make_record("lora", 2, joules=1e9, flags=("resumed",))]
    records += [make_record("lora", 3, joules=1e9, flags=("foreign_process",))]
    records += [make_record("lora", 4, joules=1e9, status="failed", reason="CUDA out of memory")]
    (table,) = build_tables(records)
    assert cells(table, "lora")["train_energy_j"].interval == Interval(2, 13000, 13000, 13000)
    text = render([table])
    assert "lora/seed2-aaaaaaaaaa (resumed: why resumed)" in text
    assert "lora/seed3-aaaaaaaaaa (foreign_process: why foreign_process)" in text
    assert "lora/seed4-aaaaaaaaaa (failed: CUDA out of memory)" in text


def test_an_arm_with_only_flagged_runs_is_shown_without_intervals(make_record):
    records = [make_record(seed=seed) for seed in (0, 1)]
    records += [make_record("lora", seed, flags=("resumed",)) for seed in (0, 1)]
    (table,) = build_tables(records)
    lora = cells(table, "lora")
    assert lora["train_energy_j"].interval == Interval(2, 13000, None, None)
    assert lora["train_energy_j_ratio"].interval is None
    assert "every run of lora is flagged" in lora["train_energy_j_ratio"].missing


def test_an_arm_whose_runs_all_failed_keeps_its_row(make_record):
    (table,) = build_tables([make_record(), make_record("lora", status="failed", reason="NaN loss")])
    assert cells(table, "lora")["train_energy_j"].missing == "no completed run"
    assert "no completed run" in render([table])


def test_ratios_need_a_block_and_qualities_do_not(make_record):
    (table,) = build_tables([make_record(), make_record("lora", block="later")])
    lora = cells(table, "lora")
    assert "no seed in one block in common with full" in lora["train_energy_j_ratio"].missing
    assert lora["test_perplexity_difference"].interval is not None


def test_one_name_with_two_configurations(make_record):
    records = [
        make_record("lora", config_hash=hash_, config={"training": {"tokens": 2_500_000, "learning_rate": rate}})
        for hash_, rate in (("aaaaaaaaaa", 1e-4), ("bbbbbbbbbb", 3e-4))
    ]
    (table,) = build_tables(records)
    assert [row.arm.label for row in table.rows] == ["lora [aaaaaa]", "lora [bbbbbb]"]
    assert "lora names several configurations, which differ in training.learning_rate: 0.0001 / 0.0003." in table.notes


def test_sources_and_phases_are_told_per_column_or_per_cell(make_record):
    same = render(build_tables([make_record(), make_record("lora")]))
    assert "J, measured (counter)" in same
    assert "J/Mtoken, measured (train)" in same
    mixed = render(build_tables([make_record(), make_record("lora", train_energy_source="instant_integral")]))
    assert "train energy: instant integral" in mixed


def test_flags_and_uncounted_operations_are_footnotes(make_record):
    flops = Flops(linear=1, attention_executed=1, attention_allowed=1, attention_dense=1, incomplete=["aten::foo"])
    text = render(build_tables([make_record(flags=("short_window",)), make_record("lora", flops=flops)]))
    assert "full [a]" in text and "[a] short_window, 1 of 1 runs of full: why short_window" in text
    assert "lora [b]" in text and "no formula for aten::foo" in text


def test_chain_energy_has_a_column_only_where_it_differs(make_record):
    assert "chain_energy_j" not in cells(build_tables([make_record()])[0], "full")
    assert "chain_energy_j" in cells(build_tables([make_record(chain_energy_j=1e5)])[0], "full")


def test_carbon_is_estimated_only_on_request(make_record):
    carbon = {"intensity_g_per_kwh": 480.0, "pue": 1.5, "source": "world mean"}
    config = {"training": {"tokens": 2_500_000}, "energy": {"carbon": carbon}}
    text = render(build_tables([make_record(joules=3.6e6, config=config)]))
    assert "Carbon of the train energy (estimated at 480 g/kWh (world mean), PUE 1.5): full 720 g." in text
    assert "Carbon" not in render(build_tables([make_record()]))


def test_markdown_fits_a_terminal(comparison):
    text = render(build_tables(comparison))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= TERMINAL_WIDTH
    assert "13,020 ± 250" in text
    assert "Energy of the train phase on NVIDIA H100 80GB HBM3, by the GPU's NVML energy counter: full 13,020" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_bar_in_a_name_does_not_break_markdown(make_record):
    assert "odd\\|kind" in render(build_tables([make_record("lora", methods=["odd|kind"])]))


def test_csv_round_trip(comparison):
    tables = build_tables(comparison)
    rows = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    assert [row["arm"] for row in rows] == ["full", "lora", "lora_s"]
    for row, expected in zip(rows, tables[0].rows, strict=True):
        interval = expected.cells["train_energy_j"].interval
        for name, value in (("mean", interval.mean), ("ci_low", interval.low), ("ci_high", interval.high)):
            assert float(row[f"train_energy_j_{name}"]) == value
        assert int(row["train_energy_j_n"]) == 3
        assert row["train_energy_j_origin"] == "measured (counter)"
    assert rows[0]["test_perplexity_dense_attention_mean"] == ""
    assert "not evaluated" in rows[0]["test_perplexity_dense_attention_note"]
    assert rows[0]["device"] == "NVIDIA H100 80GB HBM3"
    assert rows[0]["seeds"] == "0 1 2"


def test_json_is_a_list_of_panels(comparison, make_record):
    panels = json.loads(render(build_tables([*comparison, make_record(device="CPU", joules=None)]), "json"))
    assert [panel["device"] for panel in panels] == ["CPU", "NVIDIA H100 80GB HBM3"]
    assert panels[0]["arms"][0]["values"]["train_energy_j"] == {
        "n": 0,
        "mean": None,
        "ci_low": None,
        "ci_high": None,
        "note": "no GPU energy counter on this machine",
    }
    column = next(column for column in panels[1]["columns"] if column["key"] == "train_energy_j")
    assert column == {
        "key": "train_energy_j",
        "label": "train energy",
        "kind": "value",
        "unit": "J",
        "origin": "measured (counter)",
    }


def test_latex_is_escaped(make_record):
    assert escape_latex(r"a_b & 50% {x} ~ ^ \ # $ <") == (
        r"a\_b \& 50\% \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \# \$ \textless{}"
    )
    text = render(build_tables([make_record(), make_record("lora_s", flags=("short_window",))]), "tex")
    assert r"lora\_s\textsuperscript{a} &" in text
    assert "lora_s" not in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule")
    for block in text.split(r"\begin{tabular}")[1:]:
        columns = block.split("}", 1)[0].lstrip("{")
        rows = [line for line in block.split(r"\end{tabular}")[0].splitlines() if line.endswith(r"\\")]
        assert {line.replace(r"\&", "").count("&") for line in rows} == {len(columns) - 1}


def test_unknown_format():
    with pytest.raises(UserError, match="unknown table format `xls`"):
        render([], "xls")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_number(22380.4), "22,380"),
        (format_number(1234567), "1,235,000"),
        (format_number(0.69123), "0.6912"),
        (format_number(0), "0"),
        (format_number(3.2512e-7), "3.251e-07"),
        (format_interval(Interval(3, 12345.0, 12278.0, 12412.0)), "12,340 ± 70"),
        (format_interval(Interval(3, 10.53, 10.49, 10.57)), "10.53 ± 0.04"),
        (format_interval(Interval(3, 10.53, 10.529, 10.531)), "10.53 ± 0.001"),
        (format_interval(Interval(3, 2.0**31, 2.0**30, 3 * 2.0**30), factor=2.0**30), "2.000 ± 1.000"),
        (format_interval(Interval(1, 10.5)), "10.50"),
        (format_interval(Interval(3, 10.5, 10.5, 10.5)), "10.50"),
        (format_interval(Interval(3, 0.0, -2.0, 2.0)), "0.000 ± 2.000"),
        (format_ratio(Interval(3, 0.842, 0.8211, 0.8634)), "0.842 [0.821, 0.863]"),
        (format_difference(Interval(3, 0.57, 0.51, 0.63)), "+0.570 [+0.510, +0.630]"),
        (format_difference(Interval(1, -0.57)), "-0.570"),
    ],
)
def test_formats(text, expected):
    assert text == expected


def test_prefixes():
    assert scaled_unit("J", 22380.0, limit=1e6) == (1.0, "J")
    assert scaled_unit("J", 22380.0) == (1e3, "kJ")
    assert scaled_unit("J/Mtoken", 5162.0) == (1e3, "kJ/Mtoken")
    assert scaled_unit("B", 11 * 2.0**30) == (2.0**30, "GiB")
    assert scaled_unit("FLOP", 4e15) == (1e15, "PFLOP")
    assert scaled_unit("s", 5e6) == (1.0, "s")


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys; from loras_bench.results import store, tables, render, pareto, plots; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'numpy', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_dense_arm_was_evaluated_densely_as_trained(make_record):
    record = make_record()
    record.attention = {"layers": [{"pattern": {"kind": "dense"}}] * 2}
    sparse = make_record("lora_s")
    sparse.attention = {"layers": [{"pattern": {"kind": "window"}}, {"pattern": {"kind": "dense"}}]}
    assert (record.attends_densely, sparse.attends_densely) == (True, False)
    dense = Quantity("perplexity", "test", "dense")
    assert dense.read(record) == Quantity("perplexity", "test").read(record) is not None


def answered(make_record, name, accuracy, **metrics):
    reading = Quality(
        split="test",
        attention="same",
        metrics={"accuracy": accuracy, "perplexity": 1.5, **metrics},
        protocol={"rows": 400, "majority_share": 0.25},
    )
    return make_record(name, task="instruction", quality=reading.metrics["accuracy"]).model_copy(
        update={"quality": [reading]}
    )


def test_accuracy_is_told_beside_the_most_frequent_answer(make_record):
    """(0.36 - 0.25) / sqrt(0.36 0.64 / 400) = 4.58 standard errors."""
    (table,) = build_tables([answered(make_record, "full", 0.25), answered(make_record, "lora", 0.36)])
    note = next(note for note in table.notes if "most frequent answer" in note)
    assert "0.2500 of 400 test rows" in note
    assert "full 0.0, lora 4.6" in note
    assert cells(table, "lora")["test_accuracy"].interval.mean == 0.36
    assert "test_exact_match" not in cells(table, "lora")


def test_standard_errors_at_the_ends(make_record):
    perfect, hopeless = (answered(make_record, "full", share).quality[0].standard_errors for share in (1.0, 0.0))
    assert (perfect, hopeless) == (float("inf"), float("-inf"))
    assert make_record().quality[0].standard_errors is None


def test_free_responses_are_told_by_their_perplexity_and_exact_match(make_record):
    reading = Quality(split="test", attention="same", metrics={"perplexity": 1.5, "exact_match": 0.02}, protocol={})
    record = make_record(task="instruction").model_copy(update={"quality": [reading]})
    (table,) = build_tables([record])
    shown = cells(table, "full")
    assert (shown["test_perplexity"].interval.mean, shown["test_exact_match"].interval.mean) == (1.5, 0.02)
    assert not any("most frequent" in note for note in table.notes)
