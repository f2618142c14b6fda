"""A replacement spliced over its target, with what it needs."""

from __future__ import annotations

import ast

import pytest
from upstream.conftest import STOCK, TEST, WRAPPED, Toy, changed

from vllm_ext.patching.declare import Edit
from vllm_ext.upstream import binding, draft, forms
from vllm_ext.upstream.mail import BadPatchError, Mail

KERNEL = '''\
# SPDX-License-Identifier: Apache-2.0
"""A kernel.

Why it is so, as in `vllm_ext.kernels.parts`.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_ext.kernels.parts import part

TILE = 2


@triton.jit
def _toy_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, part(tl.load(x_ptr)))


def toy_reference(x: torch.Tensor) -> torch.Tensor:
    return _by_hand(x)


def _by_hand(x: torch.Tensor) -> torch.Tensor:
    return x + _deeper()


def _deeper() -> int:
    return math.ceil(0.5)


def make_scratch(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    multiprocessors = properties.multi_processor_count
    return multiprocessors


def toy(x: torch.Tensor) -> torch.Tensor:
    _toy_kernel[(1,)](x, BLOCK=triton.next_power_of_2(x.numel()))
    return x
'''
PARTS = '''\
# SPDX-License-Identifier: Apache-2.0
"""A part of it."""

import triton

TILE = 1


@triton.jit
def part(x):
    return x + 1
'''


def made(toy: Toy, path: str = "vllm/toy/sampler.py") -> str:
    form = draft.draft(toy.patch, toy.source)
    changes = {it.path: it.after for it in forms.apply(form, toy.source, exact=True)}
    return changes[path]


def with_kernel(toy: Toy, calls: bool = True) -> None:
    kernels = toy.root / "kernels"
    kernels.mkdir()
    (kernels / "toy.py").write_text(KERNEL)
    (kernels / "parts.py").write_text(PARTS)
    if not calls:
        return
    toy.says(
        "import torch as th\n",
        "import torch as th\nfrom vllm_ext.kernels import toy as op\n",
    )
    toy.says("return th.argmax(", "return op.toy(")


def test_names_become_those_of_the_file(toy: Toy):
    text = made(toy)
    assert text.startswith(STOCK.partition("import torch")[0] + "import math\n\nimport")
    assert "    def sample(self, logits: torch.Tensor) -> torch.Tensor:\n" in text
    assert "        say(str(_smallest(logits)))\n" in text
    assert "\nLIMIT = 4\n\n\ndef _smallest(values: torch.Tensor) -> float:\n" in text
    assert text.count("import torch") == 1
    ast.parse(text)


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (
            "from vllm.toy.words import loud",
            "from vllm.toy.words import WORD, loud, say",
        ),
        ("from vllm.a import A", "from vllm.a import A\nfrom vllm.toy.words"),
        ("from os import sep", "import math\nfrom os import sep\n\nimport torch\n"),
        ("import numpy as np", "import numpy as np\nimport torch\n"),
        ("from vllm.toy.words import loud as l", "WORD, loud as l, say"),
    ],
)
def test_an_import_lands_where_ruff_wants_it(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, wanted: str, line: str
):
    name = wanted.rpartition(" ")[2]
    toy.says("import torch as th\n", f"import torch as th\n{wanted}\n")
    toy.says("    tell(", f"    {name}\n    tell(")
    with_ruff = made(toy)
    if " as l" not in wanted:
        assert line in with_ruff
    monkeypatch.setattr(draft, "_formatted", lambda before, after: after)
    assert line in made(toy)


def test_decorators_of_the_target_stay(toy: Toy):
    changed(
        toy.tree / "vllm/toy/sampler.py",
        "    def sample",
        "    @torch.no_grad()\n    def sample",
    )
    assert "    @torch.no_grad()\n    def sample(self, logits" in made(toy)


def test_a_kernel_moves_into_vllm(toy: Toy):
    with_kernel(toy)
    toy.declares(
        '    modules={"vllm_ext.kernels.toy": "vllm.toy.kernel",'
        ' "vllm_ext.kernels.parts": "vllm.toy.parts"},\n'
        '    by_hand={"vllm.toy.kernel:make_scratch": ("make_scratch",)},\n'
    )
    assert "from vllm.toy import kernel as op\n" in made(toy)
    text = made(toy, "vllm/toy/kernel.py")
    assert tuple(text.splitlines()[:2]) == binding.SPDX
    assert (
        "from vllm.toy.parts import part\nfrom vllm.triton_utils import tl, triton\n"
        in text
    )
    assert "vllm_ext" not in text
    assert "as in `parts`" in text
    # What only the reference needs stays here; vLLM is asked for multiprocessors.
    for gone in ("reference", "_by_hand", "_deeper", "math", "torch.cuda"):
        assert gone not in text
    assert "multiprocessors = num_compute_units(device.index or 0)\n" in text
    assert "from vllm.utils.platform_utils import num_compute_units\n" in text
    assert "import triton\n" not in made(toy, "vllm/toy/parts.py").replace(
        "utils import triton\n", ""
    )
    toy.stored.write_text(draft.draft(toy.patch, toy.source).text())
    (toy.tree / "vllm/triton_utils.py").write_text(
        "import triton\nimport triton.language as tl\n"
    )
    binding.stamp(toy.patch, [toy.source])
    assert toy.check() == []
    changed(toy.root / "kernels/parts.py", "x + 1", "x + 2")
    assert any("vllm.toy.parts:part is not" in line for line in toy.check())
    changed(toy.stored, "+TILE = 2", "+TILE = 1")  # that of the other kernel
    assert any("vllm.toy.kernel:TILE is not" in line for line in toy.check())


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        # The toy's sampler has no `part`, and `parts` has a TILE of its own.
        ("+from vllm.toy.parts", "+from vllm.toy.sampler", "takes part from"),
        ("+from vllm.toy.parts import part\n", "+\n", "has no part"),
        (
            "+from vllm.toy.kernel import TILE",
            "+from vllm.toy.parts import TILE",
            "TILE",
        ),
    ],
)
def test_a_name_of_another_module_is_another_name(
    toy: Toy, before: str, after: str, why: str
):
    with_kernel(toy)
    toy.says("LIMIT = 4", "LIMIT = 4 + TILE")
    toy.says("import math\n", "import math\nfrom vllm_ext.kernels.toy import TILE\n")
    toy.declares(
        '    modules={"vllm_ext.kernels.toy": "vllm.toy.kernel",'
        ' "vllm_ext.kernels.parts": "vllm.toy.parts"},\n'
        '    by_hand={"vllm.toy.kernel:make_scratch": ("make_scratch",)},\n'
    )
    (toy.tree / "vllm/triton_utils.py").write_text(
        "import triton\nimport triton.language as tl\n"
    )
    toy.stored.write_text(draft.draft(toy.patch, toy.source).text())
    binding.stamp(toy.patch, [toy.source])
    assert toy.check() == []
    changed(toy.stored, before, after)
    assert any(why in line for line in toy.check())


def test_kernels_of_a_wrapper_follow_ours(toy: Toy):
    """What was written by hand stays; the kernel is moved anew."""
    toy.wraps()
    with_kernel(toy, calls=False)
    toy.says("LIMIT = 4", "from vllm_ext.kernels import parts\n\nLIMIT = 4")
    toy.declares(
        '    by_hand={"vllm.toy.sampler:Sampler.flush": ("skip",)},\n'
        '    only_here={"_foreign": "there is nothing foreign"},\n'
        '    modules={"vllm_ext.kernels.parts": "vllm.toy.parts"},\n'
    )
    (toy.tree / "vllm/triton_utils.py").write_text("import triton\n")
    for step in ("x + 1", "x + 2"):
        if step != "x + 1":
            changed(toy.root / "kernels/parts.py", "x + 1", step)
        toy.stored.write_text(draft.draft(toy.patch, toy.source).text())
        binding.stamp(toy.patch, [toy.source])
        assert toy.check() == []
        assert step in made(toy, "vllm/toy/parts.py")
        assert made(toy) == WRAPPED


def test_message_and_tests_of_the_stored_form_stay(toy: Toy):
    toy.stores(STOCK.replace("argmax", "argmin"))
    form = draft.draft(toy.patch, toy.source)
    assert form.message == "Do it.\n\nSo that it is done."
    assert [it.path for it in form.files] == [
        "tests/toy/test_sampler.py",
        "vllm/toy/sampler.py",
    ]
    assert form.files[0].added == TEST.splitlines()


def test_without_one_the_message_is_why(toy: Toy):
    assert draft.draft(toy.patch, toy.source).message == "Stock does not do it."


def refused(toy: Toy) -> str:
    with pytest.raises(BadPatchError) as caught:
        draft.draft(toy.patch, toy.source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrapper_is_finished_by_hand(toy: Toy):
    toy.wraps()
    assert "patches/toy/v0.33.0.patch" in refused(toy)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("    tell(", "    th.cuda.synchronize()\n    tell(", "torch.accelerator"),
        ("    tell(", f"    x = {'1 + ' * 20}1\n    tell(", "over 88 columns"),
        ("LIMIT", "WORD", "a WORD of its own"),
        ("import math\n", "import math\nfrom a import b as Sampler2\n", ""),
    ],
)
def test_what_would_not_pass_is_not_drafted(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, before: str, after: str, why: str
):
    monkeypatch.setattr(draft, "_formatted", lambda before, after: after)
    toy.says(before, after)
    if why:
        assert why in refused(toy)
    else:  # what is not used is not imported
        assert "Sampler2" not in made(toy)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("vllm_ext.patching.engine", "which vLLM has not"),
        ("vllm_ext.kernels.toy", "`modules` in upstream.py does not say"),
    ],
)
def test_what_vllm_does_not_have_is_not_drafted(toy: Toy, module: str, why: str):
    with_kernel(toy)
    toy.says(
        "from vllm_ext.kernels import toy as op", f"from {module} import toy as op"
    )
    assert why in refused(toy)


def test_a_target_that_is_not_there_is_not_drafted(toy: Toy):
    edit = Edit(
        "vllm.toy.sampler:Sampler.gone", "vllm_ext.patches.toy.replacement:sample"
    )
    object.__setattr__(toy.patch, "edits", (edit,))
    assert "Sampler.gone is not one definition" in refused(toy)


def test_a_draft_is_sent_without_stamps(toy: Toy):
    assert isinstance(draft.draft(toy.patch, toy.source), Mail)
    assert draft.draft(toy.patch, toy.source).stamps == {}
