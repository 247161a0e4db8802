"""The report of a small bench: its figures and files, and what it makes of results that are
hostile, failed, unfinished or few."""

import html
import html.parser
import json
import re
import shlex
import shutil
import xml.etree.ElementTree as tree
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
from benches import DESIGNS, EVIL, TEXT, lines_of, made, rewrite, with_credit

from tokenenv.bench.file import read_grid
from tokenenv.cli import main
from tokenenv.errors import InvalidArgument, RunFolderError
from tokenenv.report import texts, write_report
from tokenenv.report.curves import over_seeds
from tokenenv.report.drawing import drawn, save, whole, with_gaps
from tokenenv.report.figures import make_figures
from tokenenv.report.page import page
from tokenenv.report.reading import read

NAMES = {
    "leaderboard",
    "tokens-to-goal",
    "learning-curves",
    "regret",
    "frontier",
    "proxy-gap",
    "credit-by-position",
    "credit-places",
    "credit-over-training",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bench as it is."""
    return made(tmp_path_factory.mktemp("bench") / "plain")


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    """The same with credit that is known here."""
    return with_credit(shutil.copytree(plain, tmp_path_factory.mktemp("bench") / "small"))


@pytest.fixture(scope="module")
def report(folder):
    """Its report."""
    return write_report(folder)


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def figures_of(folder):
    return {figure.name: figure for figure in make_figures(read(folder))}


def page_of(folder):
    """The page with empty figures, which take no time."""
    found = read(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenenv.report.page.inline", lambda made, said: f"<svg>{len(said)}</svg>")
        patch.setattr("tokenenv.report.page.panel", lambda panel, rows: None)
        patch.setattr("tokenenv.report.page.swatch", lambda number: None)
        return page(found, make_figures(found), texts.chosen(found), "report")


class Elements(html.parser.HTMLParser):
    """The elements of a page, its words, and the addresses that it names."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_every_figure_is_filled_and_has_its_files(folder, report):
    assert report == folder / "report.html"
    files = {path.name for path in (folder / "report").iterdir()}
    kinds = {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png", "csv")}
    assert files == kinds | {"heat-maps.csv", "checklist.csv"}
    text = report.read_text()
    assert len(text) < 500_000
    seen = Elements(text)
    links = {value for name, value in seen.attributes if name == "href"}
    assert {f"report/{name}" for name in files} <= links
    sections = {value for name, value in seen.attributes if name == "id"}
    assert NAMES | {"heat-maps", "checklist", "settings", "commands", "versions"} <= sections
    assert {link[1:] for link in links if link.startswith("#")} <= sections
    for name in NAMES:
        assert lines_of(folder / "report" / f"{name}.csv"), name
        assert "</p><div class='panels'></div>" not in text


def test_the_page_needs_nothing_and_runs_nothing_but_its_own(report):
    text = report.read_text()
    seen = Elements(text)
    assert not {"img", "link", "iframe", "object", "image"} & set(seen.tags)
    assert seen.tags.count("script") == 1
    assert not re.findall(r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink)\b)", text)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "__" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)


def test_the_files_have_the_numbers_of_the_tables(folder, report):
    beside = folder / "report"
    summary = {line["row"]: line for line in lines_of(folder / "summary.csv")}
    board = lines_of(beside / "leaderboard.csv")
    assert {line["row"] for line in board} == set(DESIGNS)
    for line in board:
        known = summary[line["row"]]
        assert [line["value"], line["low"]] == [known["share"], known["share_low"]]
    for name, column in (("learning-curves", "gold"), ("regret", "regret"), ("frontier", "gold")):
        ends = {line["row"]: line for line in lines_of(beside / f"{name}.csv")}
        for row, line in ends.items():
            found = [float(line[f"{column}{end}"]) for end in ("", "_low", "_high")]
            known = [float(summary[row][f"{column}{end}"]) for end in ("", "_low", "_high")]
            assert found == pytest.approx(known, abs=1e-12), name
    gaps = lines_of(beside / "proxy-gap.csv")
    first = {line["row"]: float(line["train_gap"]) for line in reversed(gaps)}
    for line in gaps:
        growth = float(line["gap_growth"])
        assert growth == pytest.approx(float(line["train_gap"]) - first[line["row"]], abs=1e-6)
        proxy, gold, gap = (float(line[f"train_{name}"]) for name in ("proxy", "gold", "gap"))
        assert gap == pytest.approx(proxy - gold, abs=1e-6)


def test_a_bench_has_recorded_all_that_a_report_shows(plain):
    assert set(figures_of(plain)) == NAMES
    shown = texts.lines(texts.chosen(read(plain)))
    assert len(shown) == 4 * len(DESIGNS)
    assert {line["row"] for line in shown} == set(DESIGNS)
    assert all(isinstance(line[name], float) for line in shown for name in ("reward", "exact"))


def test_a_large_bench_has_a_page_of_bounded_size(folder, monkeypatch):
    drawing = f"<svg>{'x' * 40_000}</svg>"
    monkeypatch.setattr("tokenenv.report.page.inline", lambda made, said: drawing)
    found, figures = read(folder), make_figures(read(folder))[:1]
    many = [replace(figures[0], panels=figures[0].panels * 9)]
    text = page(found, many, [], "report")
    assert text.count("x" * 40_000) == 4 + len(DESIGNS) + 1  # and one for each key of a legend
    assert "More environments are in the files: 5." in text
    (one, *_) = texts.chosen(found)
    monkeypatch.setattr("tokenenv.report.texts.MOST_OF_ALL", 4)
    assert len(texts.chosen(found)) == 2
    long = one._replace(text={"tokens": ["a"] * 500, "token_rewards": [1.0] * 500})
    assert texts.heat_maps([long]).count("<b>a</b>") == 128
    assert "the first 128 of 500 tokens" in texts.heat_maps([long])


@pytest.mark.parametrize(
    ("gaps", "grown"),
    [
        # A reward that is gold, and one that is gold and a constant.
        ({"64": -6e-9, "128": 4e-9}, {0.0}),
        ({"64": 0.5 + 6e-9, "128": 0.5 - 4e-9}, {0.0}),
        ({"64": 3e4, "128": 3e4 + 0.01}, {0.0}),  # float32 has seven digits
        ({"64": 6e-9, "128": 1e-5}, {0.0, 1e-5}),
        ({"64": 0.5, "128": 0.25}, {0.0, -0.25}),
    ],
)
def test_what_rounding_leaves_of_equal_rewards_is_no_gap(folder, tmp_path, gaps, grown):
    found = copy(folder, tmp_path)
    lines = lines_of(found / "results.csv")
    for line in lines:
        if line["tokens"] in gaps:
            gap = gaps[line["tokens"]]
            line |= {"train_gap": gap, "train_gold": 0.25, "train_proxy": 0.25 + gap}
    rewrite(found / "results.csv", lines)
    figure = figures_of(found)["proxy-gap"]
    drawn = {at.value for series in figure.panels[0].series for at in series.points}
    assert sorted(drawn) == pytest.approx(sorted(grown), abs=1e-7)
    assert 0.0 in drawn
    assert all(abs(line["train_gap"]) > 1e-7 or line["train_gap"] == 0 for line in figure.table)


def test_credit_and_texts_are_those_of_the_cells(folder):
    figures = figures_of(folder)
    by_position = figures["credit-by-position"].table
    assert [line["correlation"] for line in by_position] == [0.5] * 3  # of one position alone
    places = [line for line in figures["credit-places"].table if line["row"] == "(exact)"]
    assert [(line["position"], line["size"]) for line in places] == [(1, 2.0), (2, 0.0)]
    found = texts.lines(texts.chosen(read(folder)))
    assert len(found) == 3 * len(DESIGNS)
    # The KL is no part of the reward that is shown.
    assert [line["reward"] for line in found[:3]] == [0.0, 1.0, 0.0]
    assert [line["advantage"] for line in found[:3]] == [1.0, None, -2.0]
    shown = texts.heat_maps(texts.chosen(read(folder)))
    assert shown.count("rgba(var(--down),0.90)") == len(DESIGNS)
    assert "<b>␣</b>" in shown
    assert "<b>a↵</b>" in shown


def test_of_several_updates_the_last_is_shown(folder, tmp_path):
    early = TEXT | {"update": 1, "tokens": ["early"] * 3}
    found = copy(folder, tmp_path)
    for path in (found / "cells").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"texts": [early, TEXT, early]}))
    assert {line["token"] for line in texts.lines(texts.chosen(read(found)))} == {"key1", "a", ""}


def test_the_command_of_a_cell_runs_the_same_cell(folder, report, tmp_path):
    found = re.findall(r"<code>(printf .*?)</code>", report.read_text())
    assert len(found) == 2 * len(DESIGNS)
    keys = {path.stem for path in (folder / "cells").glob("*.json")}
    for command in map(html.unescape, found):
        words = shlex.split(command)
        assert words[:2] == ["printf", "%s"]
        path = tmp_path / words[4]
        path.write_text(words[2])
        (cell,) = read_grid(path).cells()
        assert f"cell-{cell.key}.yaml" == words[4]
        keys.remove(cell.key)
        assert words[5:9] == ["&&", "tokenenv", "bench", words[4]]
    assert keys == set()


def test_modules_that_a_grid_names_are_allowed_in_its_commands(folder, tmp_path):
    found = copy(folder, tmp_path)
    grid = (found / "grid.yaml").read_text().replace("oracle", "my_rewards:good")
    (found / "grid.yaml").write_text(grid)
    assert "--modules my_rewards</code>" in page_of(found)


def test_labels_are_words(tmp_path):
    designs = {EVIL: "terminal", "=cmd()": "oracle"}
    envs = {EVIL: "tokenenv/DelayedKey-v0"}
    folder = made(tmp_path / "b", designs=designs, envs=envs, about=EVIL, name="n", seeds=1)
    evil_text = TEXT | {"tokens": [EVIL] * 3, "update": None}
    found = read(with_credit(folder, evil_text))
    figures = make_figures(found)[:3]  # a list of rows, and lines
    with drawn():
        text = page(found, figures, texts.chosen(found), EVIL)
        save(whole(figures[2], {EVIL: 0, "=cmd()": 1}), tmp_path / "x.svg", EVIL)
    seen = Elements(text)
    assert "img" not in seen.tags
    assert seen.tags.count("script") == 1
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert not set("\u202e\x00\ufffe") & set(text)
    shown = "</script><img src=x onerror=alert(1)>··$\\frac{a}$ 'q\" __BODY__ ·"
    assert sum(shown in word for word in seen.words) >= 10
    assert {"=cmd()", EVIL} == {line["row"] for line in figures[2].table}
    assert "frac{a}" in "".join(tree.parse(tmp_path / "x.svg").getroot().itertext())


def test_hostile_numbers_are_no_numbers(folder, tmp_path):
    found = copy(folder, tmp_path)
    lines = lines_of(found / "results.csv")
    for line in lines:
        line["gold"], line["regret"], line["train_gap"] = "<b>", "inf", "nan"
    rewrite(found / "results.csv", lines)
    odd = {"texts": "x", "correlation": ["a", {}], "learnt_size": 3, "exact_size": None}
    with_credit(found, TEXT | {"token_terms": {"a": [1]}, "token_exact": ["<b>", 1e999, []]}, odd)
    assert set(figures_of(found)) == {"leaderboard", "tokens-to-goal", "credit-over-training"}
    assert "<b></b>" not in page_of(found)


def test_cells_that_failed_are_told_and_count_nowhere(folder, tmp_path):
    bad = {"bad": "process", "end": "terminal"}
    found = made(tmp_path / "b", designs=bad, seeds=1)
    text = page_of(found)
    assert 'id="failures"' in text
    assert "step_end_token_ids" in text
    assert "1 of 2 runs have finished, 1 failed." in text
    assert "⚠ 0 of 1" in text
    assert {line["row"] for line in figures_of(found)["learning-curves"].table} == {"end"}


def test_where_everything_failed_there_is_still_a_page(tmp_path):
    found = made(tmp_path / "b", designs={"bad": "process"}, seeds=1)
    assert figures_of(found) == {}
    assert "0 of 1 runs have finished, 1 failed." in page_of(found)


def test_where_the_optimum_is_unknown_there_is_no_regret(folder, tmp_path):
    found = copy(folder, tmp_path)
    for name in ("results", "summary", "comparisons"):
        lines = lines_of(found / f"{name}.csv")
        for line in lines:
            line |= {key: "" for key in line if key.startswith(("regret", "share", "goal"))}
            line |= {"column": "gold"} if name == "comparisons" else {}
        rewrite(found / f"{name}.csv", lines)
    figures = figures_of(found)
    assert set(figures) == NAMES - {"regret", "tokens-to-goal"}
    assert {line["column"] for line in figures["leaderboard"].table} == {"gold"}
    assert "regret" not in Elements(page_of(found)).words


def test_one_seed_has_no_interval(tmp_path):
    found = made(tmp_path / "b", seeds=1)
    assert {
        at.low
        for f in figures_of(found).values()
        for p in f.panels
        for s in p.series
        for at in s.points
    } == {None}
    assert over_seeds(0, [1.0]) == (0, 1.0, None, None, 1)
    assert over_seeds(0, [1.0, 1.0]) == (0, 1.0, 1.0, 1.0, 2)


def test_a_line_breaks_where_nothing_is_known():
    points = [over_seeds(1, [0.5]), over_seeds(4, [1.0])]
    assert [at.x for at in with_gaps(points)] == [1, 2, 3, 4]
    assert [at.value for at in with_gaps(points)] == pytest.approx(
        [0.5, nan, nan, 1.0], nan_ok=True
    )


def test_the_tables_alone_are_enough(folder, tmp_path):
    found = copy(folder, tmp_path)
    for path in [*found.glob("*.parquet"), found / "grid.yaml"]:
        path.unlink(missing_ok=True)
    shutil.rmtree(found / "cells")
    assert set(figures_of(found)) == NAMES - {"credit-by-position", "credit-places"}
    text = page_of(found)
    assert 'id="heat-maps"' not in text
    assert 'id="commands"' not in text
    assert "#commands" not in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: [small", "cannot be read as YAML: while parsing a flow sequence"),
        ("- name\n", "holds no mapping of names to values"),
        (b"name: \xff\x00", "cannot be read as YAML: unacceptable character"),
        (None, "is missing"),
    ],
)
def test_a_damaged_grid_costs_what_it_says_and_no_more(folder, tmp_path, text, reason):
    found = copy(folder, tmp_path)
    whole = "tokenenv bench " + shlex.quote(str(found / "grid.yaml"))
    assert html.escape(whole) in page_of(found)
    (found / "grid.yaml").unlink()
    if text is not None:
        (found / "grid.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    assert set(figures_of(found)) == NAMES
    page = page_of(found)
    assert f"grid.yaml {reason}" in " ".join(Elements(page).words)
    assert "writes it anew" in page
    # Nobody is told to run a file that cannot be run; the cells' own commands need none.
    assert html.escape(whole) not in page
    assert page.count("printf") == 2 * len(DESIGNS)
    assert "the whole grid again:" not in page


def test_a_grid_that_may_not_be_read_is_one_that_is_damaged(folder, monkeypatch):
    read_text = Path.read_text

    def refused(path, **options):
        if path.name == "grid.yaml":
            raise PermissionError(13, "Permission denied")
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    assert read(folder).grid == {}
    assert read(folder).damage.startswith("grid.yaml cannot be read: Permission denied.")


def test_a_damaged_table_is_an_error_that_says_what_to_do(folder, tmp_path):
    found = copy(folder, tmp_path)
    with (found / "summary.csv").open("a") as file:
        file.write("x" * 200_000 + "\n")
    with pytest.raises(InvalidArgument, match=r"summary\.csv cannot be read as CSV: .* anew"):
        read(found)


def test_a_run_that_did_not_arrive_is_shown_at_the_budget(folder):
    figure = figures_of(folder)["tokens-to-goal"]
    (panel,) = figure.panels
    assert "0 of 3 rows got there." in figure.says
    assert {series.arrived for series in panel.series} == {False}
    assert {series.points[0].value for series in panel.series} == {128}


def test_what_belongs_to_a_row_has_its_class_and_colours_are_variables(report):
    text = report.read_text()
    assert 'class="row-2"' in text
    assert "var(--row1)" in text
    inside = "".join(re.findall(r'<svg role="img".*?</svg>', text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", inside)) <= {"#000000", "#ffffff"}
    ids = re.findall(r' id="([^"]+)"', re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert len(ids) == len(set(ids))


def test_the_command_writes_where_it_is_told(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("tokenenv.report.writing.make_figures", lambda found: [])
    main(["report", str(folder), "--output", str(tmp_path / "new" / "x.html")])
    assert f"open {tmp_path / 'new' / 'x.html'} in a browser" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x", "x.html"]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"has no results\.csv; `tokenenv bench` makes"):
        write_report(tmp_path)
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidArgument, match="holds no cell that has ended"):
        write_report(tmp_path)


def test_a_link_is_not_written_through(folder, tmp_path):
    found = copy(folder, tmp_path)
    (tmp_path / "mine").write_text("mine")
    (found / "report.html").unlink(missing_ok=True)
    (found / "report.html").symlink_to(tmp_path / "mine")
    with pytest.raises(RunFolderError, match="is a link"):
        write_report(found)
    assert (tmp_path / "mine").read_text() == "mine"
