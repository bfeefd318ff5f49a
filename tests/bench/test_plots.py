"""Plots of `bench.compare`, also of an incomplete record."""

from __future__ import annotations

import json

import pytest

from bench.common.optimizers import ENTRIES, WHOLE
from bench.compare import __main__ as compare
from bench.compare import page, plots
from tests.bench.fakes import no_matplotlib
from tests.bench.records import SCALING, record, row, scaled

FULL = [row("1024²", "IFShampoo", 4.0, 1.0, **{"roofline of update": 0.5}), row("1024²", "SOAP", 9.0, 2.0)]


@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib", reason="plots need matplotlib")


def test_every_plot_with_figures_is_a_png_and_on_the_page(matplotlib, tmp_path):
    broken = [{"size": 4, "optimizer": "IFShampoo", "error": "RuntimeError: no"}]
    expected = ["memory.png", "time-by-period.png"]
    assert [*plots.draw_all(record(FULL[1:], scaling={"width": broken}), tmp_path)] == expected
    assert {path.name for path in tmp_path.iterdir()} == {*expected} and plots.draw_all(record(), tmp_path) == {}
    found = record(FULL, scaling=SCALING)
    page.write(found, tmp_path)
    assert [*found["plots"]] == [name for name, _, _ in plots.PLOTS]
    text = (tmp_path / "README.md").read_text()
    for name in found["plots"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text


def bars_of(figure):
    """Return the text of each bar by its label, from top to bottom, and the colours of the bars."""
    axes = figure.axes[0]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    colors = {label: bar.get_facecolor() for label, bar in zip(labels, axes.patches, strict=True)}
    return dict(zip(labels, [text.get_text() for text in axes.texts], strict=True)), colors


def test_the_bars_of_step_times_are_sorted_relative_to_muon_and_of_the_best_setting(matplotlib):
    name = "1024×4096"
    steps = [
        row(name, "IFShampoo", 280.0, 80.0),  # 100 at T = 10
        row(name, "IFShampoo", 1.0, 1.0, block=WHOLE),
        row(name, "IFShampoo, recipe", 250.0, 120.0),
        row(name, "AdamW, fused", 5.0, 5.0, block=WHOLE, uncut=True),
        row(name, "Muon of torch", 400.0, 400.0),
        row(name, "Muon of torch", 300.0, 300.0, block=WHOLE),
        row(name, "Distributed Shampoo, eigh, packed", 5000.0, 500.0),  # 950
        row(name, "Distributed Shampoo, Newton, packed", 7700.0, 300.0),
        row(name, "SOAP", 1000.0, 1000.0),
    ]
    texts, colors = bars_of(plots.step_time(record(steps)))
    assert [*texts.items()] == [
        ("AdamW", "0.02"),
        ("IFShampoo, paper's rule, T = 10", "0.33"),
        ("IFShampoo.for_model", "0.83"),
        ("IFShampoo, paper's rule", "0.93"),
        ("Muon", "1.00"),
        ("Distributed Shampoo (Meta), T = 10", "3.17"),
        ("SOAP, T = 10", "3.33"),
    ]
    ours = {color for label, color in colors.items() if label.startswith("IFShampoo")}
    assert len(ours) == 1 and not ours & {color for label, color in colors.items() if not label.startswith("IFShampoo")}


def test_the_bars_of_memory_are_few_and_tell_t_1_from_larger_t(matplotlib):
    steps = [row("1024²", name, 1.0, 1.0, state_bytes=30.0) for name in ENTRIES]
    steps[0] |= {"state_bytes": 16.0, "state_bytes at T = 1": 12.0}
    least = next(x for x in steps if x["optimizer"] == "IFShampoo, least memory")
    least["state_bytes"] = 8.00195
    texts, _ = bars_of(plots.memory(record(steps)))
    shown = [("IFShampoo, least memory", "8.002"), ("IFShampoo", "12"), ("IFShampoo, T = 10", "16")]
    assert [*texts.items()][:3] == shown and len(texts) == 8


def test_the_bars_of_the_roofline_are_cut_at_1(matplotlib):
    steps = [row("1024²", "SGD, fused", 1.0, 1.0, **{"roofline of update": 1.46}), *FULL]
    figure = plots.roofline(record(steps))
    assert bars_of(figure)[0] == {"IFShampoo, update": "0.50", "SGD, fused": "1.46, from the cache"}
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5, 1.0]


def test_without_matplotlib_the_page_has_no_plots(tmp_path, monkeypatch):
    no_matplotlib(monkeypatch)
    page.write(record(FULL, scaling=SCALING), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "png" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("upto", ["nothing", "roofline", "half of the steps", "half of the scaling"])
def test_the_page_of_an_incomplete_record_shows_its_measurements(tmp_path, upto):
    found = record(peers={"SOAP, the authors' own": "git a1e5535"}, workloads={})
    if upto != "nothing":
        found["roofline"] = {"bandwidth": 20e9, "fp32": 150e9, "bf16": 300e9}
    if upto.startswith("half"):
        found["workloads"] = {name: record()["workloads"][name] for name in ("1024²", "16²")}
        found["steps"] = FULL
    if upto == "half of the scaling":
        found["scaling"] = {"width": scaled((10, 20))}
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert compare.main(["--page", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "## Targets" in text and ("| SOAP " in text) == upto.startswith("half")
