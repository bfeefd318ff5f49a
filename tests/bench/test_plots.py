"""Plots of `bench.compare`, also from a record that is not whole."""

from __future__ import annotations

import json

import pytest

from bench.compare import __main__ as run
from bench.compare import plots
from tests.bench.fakes import no_matplotlib
from tests.bench.records import SCALING, record, row, scaled

FULL = [row("1024²", "IFShampoo", 4.0, 1.0, **{"roofline of update": 0.5}), row("1024²", "SOAP", 9.0, 2.0)]


def test_every_plot_is_a_png_and_stands_on_the_page(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    what = record(FULL, scaling=SCALING)
    run.write_page(tmp_path, what)
    names = [name for name, _, _ in plots.PLOTS]
    assert [*what["plots"]] == names
    text = (tmp_path / "README.md").read_text()
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text


def test_a_plot_without_figures_is_neither_drawn_nor_mentioned(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    broken = [{"size": 4, "optimizer": "IFShampoo", "error": "RuntimeError: no"}]
    assert set(plots.draw_all(record(FULL[1:], scaling={"width": broken}), tmp_path)) == {
        "time-by-period.png",
        "memory.png",
    }
    assert plots.draw_all(record(), tmp_path) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"time-by-period.png", "memory.png"}


def test_without_matplotlib_the_page_has_no_plots_and_points_to_none(tmp_path, monkeypatch):
    no_matplotlib(monkeypatch)
    run.write_page(tmp_path, record(FULL, scaling=SCALING))
    text = (tmp_path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "png" not in text and "![" not in text


@pytest.mark.parametrize("upto", ["nothing", "roofline", "half of the steps", "half of the scaling"])
def test_the_page_of_a_run_that_was_cut_short_is_drawn_from_what_there_is(tmp_path, upto):
    what = record(peers={"SOAP, the authors' own": "git a1e5535"}, workloads={})
    if upto != "nothing":
        what["roofline"] = {"bandwidth": 20e9, "fp32": 150e9, "bf16": 300e9}
    if upto.startswith("half"):
        what["workloads"] = {"1024²": record()["workloads"]["1024²"], "16²": record()["workloads"]["16²"]}
        what["steps"] = FULL
    if upto == "half of the scaling":
        what["scaling"] = {"width": scaled((10, 20))}
    (tmp_path / "results.json").write_text(json.dumps(what))
    assert run.main(["--page", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "## Targets" in text and ("| SOAP |" in text) == upto.startswith("half")
