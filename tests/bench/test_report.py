"""The page of results: every figure is on it, and a browser shows it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bench.made_up import engine_result

from vllm_ext.bench import report, results
from vllm_ext.cli import main

HOST = sorted((results.RESULTS / "cpu").glob("*_host.json"))[-1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def result():
    found = engine_result(all=0.9, other=1.06)
    found["benchmarks"].append(
        results.entry(
            "greedy <b>, ours",
            "sample",
            {"batch": 1},
            [1e-5] * 3,
            cold_share_of_copy=0.873,
        )
    )
    return found


@pytest.fixture(scope="module")
def text(result):
    return report.draw([("made-up.json", result), ("host.json", report.read(HOST))])


def test_every_comparison_is_drawn_and_in_the_table(result, text):
    comparisons = result["vllm_ext"]["comparisons"]
    assert text.count("<circle") == len(comparisons)
    for each in comparisons:
        assert f"<td>{report.interval(each)}</td><td>{each['verdict']}</td>" in text


def test_a_point_lies_where_its_ratio_is(text):
    """The line of 1 and the points of a gain and a loss, from left to right."""
    one = float(re.search(r"<line class=one x1=([\d.]+)", text)[1])
    for verdict, side in (("IMPROVED", -1), ("REGRESSED", 1)):
        found = re.findall(rf"<g class={verdict}>.*?cx=([\d.]+)", text)
        assert found
        assert all(side * (float(at) - one) > 10 for at in found)


def test_cases_stand_by_batch_and_arm(text):
    labels = re.findall(r"text-anchor=end>([^<]+)<", text)
    assert labels[:2] == ["tiny, S0, batch 1, all", "tiny, S0, batch 8, all"]


def test_a_kernel_has_a_bar_as_long_as_its_share(text):
    assert "width:87.3%" in text
    assert "87%, 10 us" in text
    assert "greedy &lt;b&gt;, ours" in text


def test_the_parts_of_a_step_add_up_to_the_bar(text):
    kept = json.loads(HOST.read_text())
    rows = {(row["batch"], row["mode"], row["part"]): row for row in kept["rows"]}
    batch, mode = kept["rows"][0]["batch"], kept["rows"][0]["mode"]
    longest = max(
        sum(rows[number, name, part]["stock_us"] for part in report.PARTS)
        for number, name, part in rows
        if part == "step"
    )
    for part in report.PARTS:
        share = 100 * rows[batch, mode, part]["stock_us"] / longest
        assert f"width:{share:.2f}%" in text
    assert text.count("<span>patched</span>") == len(kept["rows"]) // 6


def test_it_needs_nothing_else(text):
    assert not re.search(r"https?:|<link|<img|<script|@import|url\(", text)


def test_the_command_draws_the_newest_kept_files(tmp_path, monkeypatch, capsys, result):
    folder = tmp_path / "cpu"
    folder.mkdir()
    for day in ("2026-01-01", "2026-01-02"):
        name = f"{day}_abcdef0_vllm-0.32.0_engine.json"
        results.save(result, folder / name)
    (folder / "2026-01-02_abcdef0_vllm-0.32.0_prove.json").write_text("{}")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = tmp_path / "page.html"
    assert main(["bench", "report", "-o", str(page)]) == 0
    assert "1 results" in capsys.readouterr().out
    assert "2026-01-02_abcdef0" in page.read_text()
    assert "2026-01-01_abcdef0" not in page.read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{", "is not JSON"),
        ("x_host.json", "{", "is damaged"),
        ("x_host.json", '{"measured": "", "machine": {}, "rows": [{}]}', "is damaged"),
        ("x.json", '{"measured": 1}', "is no result"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_text(content)
    arguments = [str(tmp_path / name), "-o", str(tmp_path / "page.html")]
    assert main(["bench", "report", *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert main(["bench", "report", "-o", str(tmp_path / "no" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_no_results_at_all_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["bench", "report", "-o", str(tmp_path / "page.html")]) == 1
    assert "no result files" in capsys.readouterr().err


def test_a_browser_shows_it(tmp_path, text):
    """Nothing lies outside the page, and the plot is drawn in the verdicts' colours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert browser, "no browser: run make browser"
    probe = """<script>addEventListener("load", () => {
      const wide = [...document.querySelectorAll("section *")].filter(each =>
        each.getBoundingClientRect().right > innerWidth + 1).length;
      const colour = verdict => getComputedStyle(
        document.querySelector(`g.${verdict} circle`)).fill;
      document.title = JSON.stringify({ wide, better: colour("IMPROVED"),
        worse: colour("REGRESSED"),
        bars: document.querySelector(".steps i").getBoundingClientRect().width > 2 });
    })</script>"""
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(text.replace("</body>", f"{probe}</body>"))
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1600"),
    ]

    def browse(*more: str) -> str:
        return subprocess.run(
            [browser, *options, *more, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    title = re.search(r"<title>(\{.*?\})</title>", browse("--dump-dom"))[1]
    seen = json.loads(title)
    assert seen["wide"] == 0
    assert seen["bars"]
    assert seen["better"] != seen["worse"]
    browse(f"--screenshot={picture}")
    assert Path(picture).read_bytes()[1:4] == b"PNG"
    assert picture.stat().st_size > 20_000


def test_names_are_text_and_nothing_else(result):
    odd = {**result["vllm_ext"]["comparisons"][0], "case": "a<b>&c", "arm": "<i>"}
    ours = {**result["vllm_ext"], "comparisons": [odd], "command": ["<u>"]}
    drawn = report.draw([("<s>.json", {**result, "vllm_ext": ours})])
    for tag in ("<b>&c", "<i>,", "<i></text>", "<u>", "<s>"):
        assert tag not in drawn
    assert "a&lt;b&gt;&amp;c" in drawn
