"""The page of a captured step: what is on it, and that a browser shows it."""

import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from prove.graphs_planted import Toy, takes_a_rotating_buffer

from vllm_ext.prove import graphs, page
from vllm_ext.prove.pretend import PretendDevice

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def entry():
    """A step of two operations, one of which moves."""
    with PretendDevice():
        toy = Toy()
        captured = []
        for _ in range(2):
            captured.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(captured[-1]):
                takes_a_rotating_buffer(toy)
            toy.advance()
        moving = graphs.diff(*captured)
        [argument] = moving
        return {
            "graph": graphs.describe(captured[0], moving),
            "launches": captured[0].counts(),
            "moving": [{"when": "every step", "argument": argument.argument}],
        }


@pytest.fixture(scope="module")
def text(entry):
    return page.draw(entry, title="A <small> step")


def memory(entry, **wanted):
    [at] = [
        at
        for at, each in enumerate(entry["graph"]["memories"])
        if wanted.items() <= each.items()
    ]
    return at


def test_every_operation_and_all_memory_is_on_it(entry, text):
    rows = re.findall(r"<li data-reads='([\d ]*)' data-writes='([\d ]*)'>", text)
    nodes = entry["graph"]["nodes"]
    assert rows == [
        tuple(" ".join(map(str, node[verb])) for verb in ("reads", "writes"))
        for node in nodes
    ]
    shown = re.findall(r"<button class=memory data-memory=(\d+)", text)
    assert sorted(map(int, shown)) == list(range(len(entry["graph"]["memories"])))
    assert "toy.table.sum() + toy.slots[toy.host_steps % 2]" in text


def test_what_moves_comes_first_and_is_marked(entry, text):
    slot = memory(entry, own=False, shape=[3])
    first, _, rest = text.partition("<h2 class=moves>")[2].partition("<h2")
    assert f"data-memory={slot}" in first
    assert f"class=memory data-memory={slot}" not in rest
    [chip] = re.findall(r"<button tabindex=-1 class='[^']*moves[^']*' ([^ ]*)", text)
    assert chip == f"data-memory={slot}"
    assert "<b class=moves>1</b> arguments move every step" in text


def test_it_needs_nothing_else_and_is_not_fooled_by_names(text):
    assert not re.search(r"https?:|<link|<img|<script src|@import|url\(", text)
    assert "<h1>A &lt;small&gt; step</h1>" in text


# -- in a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Open a page in a browser without a window; what it wrote to its output."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("no browser to look at the page with: apt-get install chromium")

    def run(text: str, *options: str, at: str = "") -> str:
        folder = tmp_path_factory.mktemp("page")
        (folder / "page.html").write_text(text)
        address = (folder / "page.html").as_uri() + at
        done = subprocess.run(
            [
                *(found, "--headless", "--no-sandbox", "--disable-gpu"),
                *(f"--user-data-dir={folder / 'profile'}", "--window-size=1300,700"),
                *(*options, address),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    return run


def chosen(document: str) -> list[str]:
    """The classes of each row: what the script made of the chosen memory."""
    rows = re.findall(r"<li data-reads=[^>]*>", document)
    found = [re.search(r'class="([^"]*)"', row) for row in rows]
    return [match[1] if match else "" for match in found]


def test_a_browser_marks_who_reads_and_writes(entry, text, browse):
    total = memory(entry, own=True, shape=[])
    assert chosen(browse(text, "--dump-dom", at=f"#{total}")) == ["writes", "reads"]
    assert chosen(browse(text, "--dump-dom")) == ["", ""]


def test_the_keyboard_walks_through_memory(text, browse):
    keys = ("ArrowDown", "Escape", "ArrowDown", "ArrowDown", "ArrowUp")
    script = f"""
        const press = key => dispatchEvent.call(
            document, new KeyboardEvent("keydown", {{ key }}));
        document.title = JSON.stringify({list(keys)}.map(key => {{
            press(key);
            return rows.map(row => row.className);
        }}));
    """
    pressed = text.replace("</script>", f"{script}</script>")
    title = re.search("<title>(.*)</title>", browse(pressed, "--dump-dom"))
    # What moves is the first memory, and what the second operation reads.
    nothing, first, second = ["", ""], ["", "reads"], ["reads", ""]
    assert json.loads(title[1]) == [first, nothing, first, second, first]


def test_a_browser_draws_it(text, browse, tmp_path: Path):
    def ink(name, document):
        """Share of bytes that are not the pixel to their left, or above."""
        browse(document, f"--screenshot={tmp_path / name}", "--hide-scrollbars")
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        pixels, at = b"", 8
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] == b"IDAT":
                pixels += data[at + 8 : at + 8 + size]
            at += size + 12
        rows = zlib.decompress(pixels)
        return 1 - rows.count(0) / len(rows)

    blank = ink("blank.png", "<!doctype html><html><body></body></html>")
    assert ink("page.png", text) > blank + 0.01
