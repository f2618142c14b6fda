"""Whatever changes on either side of a stored form is noticed."""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent

import pytest
from upstream.conftest import STOCK, TEST, WORDS, WRAPPED, Toy, changed, diff

from vllm_ext.patching.declare import Edit
from vllm_ext.upstream import binding, draft, mail, pullrequest
from vllm_ext.upstream.forms import Changed
from vllm_ext.upstream.mail import BadPatchError, FileDiff, Mail

# `sample` of the toy's replacement, as a method of stock's sampler.
SPLICED = (
    STOCK.replace("import torch\n", "import math\n\nimport torch\n")
    .replace(
        "\n\nclass",
        """
LIMIT = 4


def _smallest(values: torch.Tensor) -> float:
    return min(float(values.min()), math.inf)


class""",
    )
    .replace(
        """\
        say(WORD)
        return torch.argmax(logits, dim=-1)
""",
        """\
        # Said otherwise, and the same.
        say(str(_smallest(logits)))
        return torch.argmax(logits[:LIMIT], dim=-1)
""",
    )
)


MORE = """\
--- a/vllm/toy/words.py
+++ b/vllm/toy/words.py
@@ -3 +3 @@
-WORD = "stock"
+WORD = "other"
"""


# Another patch's method, which calls what the toy's form adds.
FLUSHED = SPLICED.replace(
    "        for _ in range(self.size):\n            say(WORD)\n",
    "        say(str(_smallest(torch.zeros(self.size))))\n",
)


@pytest.fixture
def spliced(toy: Toy) -> Toy:
    toy.declares()
    toy.stores(SPLICED)
    return toy


@pytest.fixture
def wrapped(toy: Toy) -> Toy:
    toy.wraps()
    binding.stamp(toy.patch, [toy.source])
    return toy


def test_a_form_that_says_what_runs_is_well(spliced: Toy):
    assert spliced.check() == []
    assert spliced.unbound(SPLICED) == ()


# -- replacements ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("logits[:LIMIT]", "logits[: LIMIT + 1]"),
        ("LIMIT = 4", "LIMIT = 5"),
        ("values.min()", "values.max()"),
        ("say as tell", "WORD as tell"),
        ("import math", "import cmath as math"),
        ("logits: th.Tensor)", "logits: th.Tensor | None)"),
        ("def sample(", "@th.no_grad()\ndef sample("),
        ("dim=-1", "dim=True"),
        ("dim=-1", "dim=None"),
        ("    tell(", "    kind: str = '1'\n    tell("),
    ],
)
def test_a_change_of_our_code_is_noticed(spliced: Toy, before: str, after: str):
    spliced.says(before, after)
    found = spliced.unbound(SPLICED)
    assert any("is not the plugin's code" in line for line in found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.argmax(logits[", "torch.argmin(logits["),
        ("LIMIT = 4", "LIMIT = 3"),
        ("import math", "import cmath as math"),
        ("self.size = size", "self.size = size + 1"),
        ("class Sampler:", "class Sampler(list):"),
        ("class Sampler:", "class Sampler:\n    slots = 1\n"),
        ("LIMIT = 4", "LIMIT = 4\nsay(LIMIT)"),
    ],
)
def test_a_change_of_the_form_is_noticed(spliced: Toy, before: str, after: str):
    assert before in SPLICED
    found = spliced.unbound(SPLICED.replace(before, after))
    assert any("is not the plugin's code" in line for line in found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""Ours says so."""', '"""Said otherwise."""'),
        ("    tell(", "    # why\n    tell("),
        ("import torch as th", "import torch as th  # why"),
        ("self: Sampler", "self"),
        ("    tell(", "    kind: str\n    tell("),
    ],
)
def test_what_says_the_same_is_the_same(spliced: Toy, before: str, after: str):
    spliced.says(before, after)
    assert spliced.unbound(SPLICED) == ()


def test_a_name_is_followed_to_where_it_is_defined(spliced: Toy):
    """Imported from a module that only passes it on, it is still the same name."""
    package = spliced.tree / "vllm/toy/__init__.py"
    package.write_text("from vllm.toy.words import say\n")
    spliced.says("vllm.toy.words import", "vllm.toy import")
    assert spliced.unbound(SPLICED) == ()
    (spliced.tree / "vllm/toy/other.py").write_text(WORDS)
    package.write_text("from vllm.toy.other import say\n")
    assert any("Sampler.sample is not" in line for line in spliced.unbound(SPLICED))


def test_a_touched_module_may_pass_a_name_on(spliced: Toy):
    """What a patched file only imports is what it imports, not that file's own."""
    spliced.says("vllm.toy.words import say", "vllm.toy.sampler import say")
    assert spliced.unbound(SPLICED) == ()
    spliced.says("say as tell", "WORD as tell")
    assert spliced.unbound(SPLICED) != ()


def test_a_file_that_has_no_part_in_it_is_noticed(spliced: Toy):
    sampler = Changed("vllm/toy/sampler.py", STOCK, SPLICED)
    words = Changed("vllm/toy/words.py", WORDS, f"{WORDS}import os\n")
    declared = binding.prose(spliced.patch)
    bound = binding.bind(spliced.patch, declared, [sampler, words], spliced.source)
    assert bound.problems == ("vllm/toy/words.py: only imports or text of it change",)


def test_code_that_is_left_out_is_noticed(spliced: Toy):
    spliced.says("def sample(", "def more():\n    pass\n\n\ndef sample(")
    (line,) = spliced.unbound(SPLICED)
    assert "more of replacement.py is not in the form" in line


# -- finished by hand ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ("self.size < LIMIT", "self.size <= LIMIT", "skip (plugin)"),
        ('!= "vllm"', '!= "torch"', "_foreign (plugin)"),
    ],
)
def test_what_was_compared_is_compared_again(
    wrapped: Toy, before: str, after: str, name: str
):
    wrapped.says(before, after)
    (line,) = wrapped.check()
    assert f"{name} is not what it was" in line
    assert "vllm-ext export --stamp toy" in line
    binding.stamp(wrapped.patch, [wrapped.source])
    assert wrapped.check() == []


def test_so_is_what_was_made_of_it(wrapped: Toy):
    wrapped.stores(WRAPPED.replace("self.size >= LIMIT", "self.size > LIMIT"))
    (line,) = wrapped.check()
    assert "vllm.toy.sampler:Sampler.flush (upstream) is not what it was" in line


def test_a_global_is_compared_beside_what_is_stamped(wrapped: Toy):
    wrapped.says("LIMIT = 4", "LIMIT = 5")
    assert len(wrapped.check()) == 2  # neither is the other's


def test_what_nobody_named_is_noticed(wrapped: Toy):
    wrapped.stores(WRAPPED.replace("LIMIT = 4", "LIMIT = 4\nMORE = 1"))
    (line,) = wrapped.check()
    assert "vllm.toy.sampler:MORE is not the plugin's code" in line


def test_names_that_are_nothing_are_noticed(wrapped: Toy):
    wrapped.declares(
        '    by_hand={"vllm.toy.sampler:Sampler.flush": ("skip", "gone"),'
        ' "vllm.toy.sampler:Sampler.sample": ("skip",)},\n'
        '    only_here={"_foreign": "upstream has no samplers from elsewhere"},\n'
    )
    found = "\n".join(wrapped.check())
    assert "upstream.py names gone, which the plugin does not define" in found
    assert "Sampler.sample, which no form changes" in found


def test_a_stamp_is_not_for_what_is_not_declared(wrapped: Toy):
    before = wrapped.stored.read_text()
    wrapped.declares()
    with pytest.raises(BadPatchError, match="does not name it"):
        binding.stamp(wrapped.patch, [wrapped.source])
    assert wrapped.stored.read_text() == before


def test_stamps_are_not_sent(wrapped: Toy):
    form = mail.read(wrapped.stored)
    assert set(form.stamps) == {
        "plugin skip",
        "plugin _foreign",
        "upstream vllm.toy.sampler:Sampler.flush",
    }
    assert "Stamp" not in form.unstamped().text()
    assert form.unstamped().files == form.files


# -- what vLLM refuses -----------------------------------------------------------------


def refused(toy: Toy, stock: str = STOCK) -> list[str]:
    form = mail.read(toy.stored)
    before = {"vllm/toy/sampler.py": stock}
    changes = [Changed(it.path, before.get(it.path, ""), "") for it in form.files]
    return binding.lint(form, changes)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("torch.cuda.synchronize()", "torch.cuda"),
        ("torch.cuda.Stream()", "no new torch.cuda"),
        ("import triton.language as tl", "vllm.triton_utils"),
        ("import re", "regex"),
        ("import pickle", "no pickle"),
        (f"x = {'1 + ' * 20}1", "over 88 columns"),
    ],
)
def test_what_vllms_own_checks_refuse_is_refused(spliced: Toy, line: str, why: str):
    spliced.stores(SPLICED.replace("    return min(", f"    {line}\n    return min("))
    assert any(why in problem for problem in refused(spliced))


def test_tests_may_time_with_cuda(spliced: Toy):
    spliced.stores(SPLICED, test=TEST.replace("assert", "assert torch.cuda.Event or"))
    assert refused(spliced) == []
    spliced.stores(SPLICED, test=TEST.replace("assert", "torch.cuda.synchronize()#"))
    assert any("torch.accelerator" in problem for problem in refused(spliced))


def test_what_a_file_has_already_is_not_new(spliced: Toy):
    new = "    return torch.cuda.Stream() and min("
    spliced.stores(SPLICED.replace("    return min(", new))
    assert refused(spliced) != []
    before = STOCK.replace("self.size = size", "self.size = torch.cuda.Stream()")
    assert refused(spliced, before) == []


def test_a_new_file_needs_its_licence(spliced: Toy):
    spliced.stores(SPLICED, test=TEST.replace("Apache-2.0", "MIT"))
    (line,) = refused(spliced)
    assert "tests/toy/test_sampler.py does not begin with vLLM's two SPDX lines" in line


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("\n-        say(WORD)", "\n-        say(WORDS)", "git apply"),
        ("+import math", "+import math(", "does not compile"),
        ("Subject: [PATCH] [Perf][Toy] Do it", "Subject: [PATCH] It", "its subject"),
        ("\nDo it.", "\nSigned-off-by: A <a@b.c>", "only the person who sends it"),
        ("\n-        say(WORD)", "", "ends where it should not"),
        ("\ndiff --git a/v", "\nsomething\ndiff --git a/v", "where it should not"),
        ("--- a/vllm/toy/sampler.py", "--- a/../x.py", "git apply"),
        ("diff --git", "diff", "holds no `diff --git`"),
        ("Subject", "Object", "has no Subject"),
        ("a/vllm/toy/sampler.py", "a/vllm/toy/other.py", "paths differ"),
        ("new file mode 100644", "new file mode 100755", "is not handled"),
        ("--- a/v", "old mode 100644\nnew mode 100755\n--- a/v", "is not handled"),
        ("tests/toy/test_sampler.py", "setup.py", "neither Python of vllm/"),
        ("tests/toy/test_sampler.py", "vllm/toy/words.json", "neither Python of"),
        ("-- \nvllm-ext\n", f"-- \n\n{MORE}", "goes on below what ends it"),
    ],
)
def test_a_form_that_is_broken_gets_a_line(
    spliced: Toy, before: str, after: str, why: str
):
    changed(spliced.stored, before, after)
    lines = spliced.check()
    assert any(why in line for line in lines), lines
    assert all("\n" not in line for line in lines)


def test_a_line_ends_where_git_ends_it(spliced: Toy):
    changed(spliced.stored, '+"""Toy."""', '+"""Toy\x0c \u2028."""')
    assert spliced.check() == []
    assert len(mail.read(spliced.stored).files[0].added) == TEST.count("\n")


def test_lines_that_moved_are_another_version(spliced: Toy):
    """Of the vLLM that the form is for; another one may have them elsewhere."""
    spliced.stores(STOCK.replace("range(self.size)", "range(2 * self.size)"))
    assert not any("is not for this text" in line for line in spliced.check())
    changed(spliced.tree / "vllm/toy/sampler.py", "import torch", "import os, torch\n")
    assert any("is not for this text" in line for line in spliced.check())
    changed(spliced.tree / "vllm/_version.py", "0.33.0", "0.32.0")
    assert not any("is not for this text" in line for line in spliced.check())


def test_a_form_without_its_vllm_or_its_prose_gets_a_line(spliced: Toy):
    spliced.stored.rename(spliced.folder / "v0.31.0.patch")
    (line,) = spliced.check()  # it is put on 0.33.0 all the same
    assert "there is no vLLM 0.31.0 here" in line
    (spliced.folder / "upstream.py").write_text("UPSTREAM = 1\n")
    assert "UPSTREAM" in spliced.check()[0]
    (spliced.folder / "upstream.py").write_text("UPSTREAM = \n")
    assert "SyntaxError" in spliced.check()[0]
    (spliced.folder / "upstream.py").unlink()
    assert "is missing" in spliced.check()[0]


@pytest.fixture
def on_top(spliced: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A patch whose form is written on top of the toy's."""
    edit = Edit("vllm.toy.sampler:Sampler.flush", "vllm_ext.patches.more.replacement:f")
    patch = replace(spliced.patch, name="more", edits=(edit,))
    monkeypatch.setattr(binding, "SERIES", (spliced.patch, patch))
    folder = spliced.root / "patches" / "more"
    folder.mkdir()
    (folder / "replacement.py").write_text(
        dedent("""\
        import torch

        from vllm.toy.words import say
        from vllm_ext.patches.toy.replacement import _smallest


        def f(self) -> None:
            say(str(_smallest(torch.zeros(self.size))))
        """)
    )
    path = "vllm/toy/sampler.py"
    text = diff(path, SPLICED, FLUSHED)
    form = Mail(patch.summary, "Do more.", (FileDiff(path, text),), {})
    (folder / "v0.33.0.patch").write_text(form.text())
    text = (spliced.folder / "upstream.py").read_text()
    needs = text[: text.rindex(")")] + "    needs=('toy',),\n)\n"
    (folder / "upstream.py").write_text(needs)
    return Toy(spliced.root, patch)


def test_a_form_may_need_another_one_first(on_top: Toy):
    assert on_top.check() == []
    declared = binding.prose(on_top.patch)
    text = pullrequest.text(
        on_top.patch,
        declared,
        mail.read(on_top.root / "patches/more/v0.33.0.patch"),
        "0.33.0",
    )
    assert f"**Stands on** `{on_top.patch.summary}`" in text


def test_it_has_to_say_so(on_top: Toy):
    more = on_top.root / "patches" / "more"
    changed(more / "upstream.py", "    needs=('toy',),\n", "")
    assert "git apply" in on_top.check()[0]
    changed(more / "upstream.py", ")\n", "    needs=('toys',),\n)\n")
    assert "names toys, which has no upstream form" in on_top.check()[0]


def test_a_name_of_what_it_needs_is_that_patch_s(on_top: Toy):
    more = on_top.root / "patches" / "more"
    path, there = more / "replacement.py", "toy.replacement import _smallest"
    changed(path, there, "toy.replacement import sample as _smallest")
    assert any("is not the plugin's code" in line for line in on_top.check())


def test_the_draft_is_bound(toy: Toy):
    toy.declares()
    toy.stored.write_text(draft.draft(toy.patch, toy.source).text())
    assert toy.check() == []
