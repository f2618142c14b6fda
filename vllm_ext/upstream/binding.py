"""What binds a stored upstream form to the code that the plugin runs.

Every function, method, class and global that the form changes in vLLM is one of two:

* the plugin's own, syntax tree for syntax tree (`vllm_ext.upstream.code`);
* finished by hand, since upstream needs no wrapper: then ``by_hand`` in the patch's
  ``upstream.py`` says which definitions of the plugin it says the same as. A stamp in
  the stored mail holds digests of both sides as they were when somebody compared them;
  whatever changes later fails the check until they are compared again.

The other way round, every definition of ``replacement.py`` is in upstream's form, or
named by ``by_hand``, or ``only_here`` says why upstream needs none of it. Nothing of
either side can change unseen.
"""

from __future__ import annotations

import hashlib
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

from vllm_ext.patches import SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import Source, SourceError
from vllm_ext.upstream import forms, mail
from vllm_ext.upstream.code import Module, Read
from vllm_ext.upstream.declare import Upstream
from vllm_ext.upstream.forms import Changed
from vllm_ext.upstream.mail import BadPatchError, Mail

KERNELS = "vllm_ext.kernels."
UNCOMPARED = {"NAME"}  # what `step_aside` is told, which is only here
SPDX = (
    "# SPDX-License-Identifier: Apache-2.0",
    "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project",
)
WIDTH = 88
# What vLLM's own hooks refuse in a pull request, and what they want instead.
REFUSED = (
    (r"^\s*(import|from)\s+triton\b", "import triton from vllm.triton_utils"),
    (r"^\s*(import|from)\s+re\b", "import regex as re"),
    (r"^\s*(import|from)\s+(cloud)?pickle\b", "no pickle"),
    (
        r"\btorch\.cuda\.(empty_cache|synchronize|\w*device\w*|\w*memory\w*|mem_get_info"
        r"|manual_seed\w*)\b",
        "torch.accelerator or current_platform",
    ),
)
NO_CUDA = (r"\btorch\.cuda\.\w+", "no new torch.cuda in vllm/")


def prose(patch: Patch) -> Upstream:
    """What ``upstream.py`` of a patch declares.

    Raises:
        BadPatchError: There is none, or it declares nothing.
    """
    file = forms.PATCHES / patch.name / "upstream.py"
    if not file.is_file():
        raise BadPatchError(
            f"{patch.name}: {file} is missing; it says UPSTREAM = Upstream(...)"
        )
    try:
        declared = runpy.run_path(str(file)).get("UPSTREAM")
    except Exception as error:
        raise BadPatchError(
            f"{patch.name}: {file} cannot be read: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(declared, Upstream):
        raise BadPatchError(f"{patch.name}: {file} does not say UPSTREAM = Upstream()")
    return declared


def needed(declared: Upstream) -> list[Patch]:
    """The patches whose forms are merged before this one.

    Raises:
        BadPatchError: One that is named has no form.
    """
    by_name = {patch.name: patch for patch in SERIES if forms.stored(patch)}
    for name in declared.needs:
        if name not in by_name:
            raise BadPatchError(f"`needs` names {name}, which has no upstream form")
    return [by_name[name] for name in declared.needs]


def beneath(declared: Upstream, source: Source) -> Source:
    """What a form is put on: a vLLM, with the forms in it that are merged before.

    Raises:
        BadPatchError: One of these does not apply.
    """
    for patch in needed(declared):
        form = mail.read(_form(patch, source))
        source = forms.patched(source, forms.apply(form, source, exact=False))
    return source


def _form(patch: Patch, source: Source) -> Path:
    path = forms.form_for(patch, source.version)
    assert path is not None
    return path


def _own_beneath(declared: Upstream, source: Source, read: Read) -> frozenset[str]:
    """The modules on both sides of what is merged before: compared with each other."""
    names: set[str] = set()
    for patch in needed(declared):
        names |= {module.name for module in ours(patch, read, frozenset())}
        files = mail.read(_form(patch, source)).files
        names |= {forms.module_of(file.path) for file in files if file.is_code}
    return frozenset(names)


def our_file(module: str) -> Path | None:
    """The file of ``vllm_ext.patches...`` or ``vllm_ext.kernels...``."""
    top, _, rest = module.partition(".")
    if top != "vllm_ext" or rest.split(".")[0] not in ("patches", "kernels"):
        return None
    # Beside each other in a checkout and in an installation alike.
    path = forms.PATCHES.parent / Path(*rest.split("."))
    file = path.with_suffix(".py")
    return next((each for each in (file, path / "__init__.py") if each.is_file()), None)


def reader(source: Source, changes: list[Changed]) -> Read:
    """Text of any module of vLLM as patched, and of ours."""
    after = {change.module: change.after for change in changes}

    def read(module: str) -> str | None:
        if module in after:
            return after[module]
        if module.partition(".")[0] == source.package:
            return source.text(module)
        file = our_file(module)
        return file.read_text("utf-8") if file else None

    return read


def ours(patch: Patch, read: Read, own: frozenset[str]) -> list[Module]:
    """What the plugin runs for a patch: the modules of its folder, then kernels."""
    folder = f"vllm_ext.patches.{patch.name}."
    names = list(dict.fromkeys(edit.by.partition(":")[0] for edit in patch.edits))
    for name in names:  # grows
        for meant in Module(name, read(name) or "", read).imported.values():
            for part in (meant, meant.rpartition(".")[0]):
                is_ours = part.startswith((folder, KERNELS)) and read(part)
                if is_ours and part not in names:
                    names.append(part)
    own |= set(names)
    return [
        Module(name, read(name) or "", read, own)
        for name in sorted(names, key=lambda name: name.startswith(KERNELS))
    ]


def kernels_of(patch: Patch) -> list[str]:
    """The modules of kernels that a patch runs."""

    def read(module: str) -> str | None:
        file = our_file(module)
        return file.read_text("utf-8") if file else None

    found = [module.name for module in ours(patch, read, frozenset())]
    return [name for name in found if name.startswith(KERNELS)]


@dataclass(frozen=True)
class Binding:
    """A form beside the plugin's code.

    Attributes:
        same: What the form changes that is the plugin's own -> where it is there.
        by_hand: What it changes that is declared to be finished by hand.
        stamps: Digests of everything that no syntax tree compares.
        problems: What is neither, one line each.
    """

    same: dict[str, str]
    by_hand: tuple[str, ...]
    stamps: dict[str, str]
    problems: tuple[str, ...]


def bind(
    patch: Patch, declared: Upstream, changes: list[Changed], source: Source
) -> Binding:
    """Compare what ``changes`` do to vLLM with what the plugin runs."""
    code = [change for change in changes if change.path.startswith("vllm/")]
    read = reader(source, code)
    own = _own_beneath(declared, source, read)
    modules = ours(patch, read, own.union(change.module for change in code))
    plugin = {f"{each.name}:{unit}": each for each in modules for unit in each.units}
    own = modules[0].own
    by = {edit.target: edit.by for edit in patch.edits if edit.how == "replace"}
    moved = {theirs: ours for ours, theirs in declared.modules.items()}

    same: dict[str, str] = {}
    by_hand: list[str] = []
    stamps: dict[str, str] = {}
    problems: list[str] = []
    patched = {it.module: Module(it.module, it.after, read, own) for it in code}
    for change in code:
        before = Module(change.module, change.before, read, own)
        after = patched[change.module]
        if change.before and all(
            after.says(unit) == before.says(unit)
            for unit in {**after.units, **before.units}
        ):
            problems.append(f"{change.path}: only imports or text of it change")
        for unit in dict.fromkeys([*after.units, *before.units]):
            says = after.says(unit)
            if says == before.says(unit):
                continue
            target = f"{change.module}:{unit}"
            candidates = [by[target]] if target in by else []
            if change.module in moved:
                candidates.append(f"{moved[change.module]}:{unit}")
            else:
                names = (unit, unit.rpartition(".")[2])
                candidates += [f"{it.name}:{name}" for it in modules for name in names]
            for place in candidates:
                if place in plugin and says == plugin[place].says(_unit(place)):
                    same[target] = place
            if target in same:
                continue
            if target in declared.by_hand:
                by_hand.append(target)
                stamps[f"upstream {target}"] = after.digest(unit)
            else:
                problems.append(
                    f"{target} is not the plugin's code, and `by_hand` in upstream.py "
                    "does not name it"
                )

    for target in (*same, *by_hand):
        problems += _misled(target, same, patched, plugin)

    spoken = {name for names in declared.by_hand.values() for name in names}
    spoken |= set(declared.only_here)
    unknown = spoken - {_top(place) for place in plugin}
    problems += [
        f"upstream.py names {name}, which the plugin does not define"
        for name in sorted(unknown)
    ]
    compared_by_eye: dict[str, str] = {}
    for place, module in plugin.items():
        name = _unit(place)
        if place in same.values():
            continue
        if _top(place) in spoken:
            key = f"plugin {_top(place)}"
            compared_by_eye[key] = compared_by_eye.get(key, "") + module.digest(name)
        elif not module.name.startswith(KERNELS) and name not in UNCOMPARED:
            problems.append(
                f"{name} of {module.name.rpartition('.')[2]}.py is not in the form, "
                "and neither `by_hand` nor `only_here` in upstream.py names it"
            )
    for key, digests in compared_by_eye.items():
        stamps[key] = hashlib.sha256(digests.encode()).hexdigest()[:12]
    return Binding(same, tuple(by_hand), stamps, tuple(problems))


def _misled(
    target: str,
    same: dict[str, str],
    patched: dict[str, Module],
    plugin: dict[str, Module],
) -> list[str]:
    """What a definition of the form takes from another module than the plugin does."""
    theirs = patched[target.partition(":")[0]].leans_on(_unit(target))
    ours: list[tuple[str, str] | None] = [None] * len(theirs)
    if target in same:
        ours = plugin[same[target]].leans_on(_unit(same[target]))
    problems = []
    for one, other in zip(theirs, ours, strict=True):
        if one is None and other is not None:
            problems.append(f"{target} has no {other[1]}: not defined, not imported")
        if one is None or one[0] not in patched:
            continue
        module, name = one
        bound = same.get(f"{module}:{name}")
        meant = f"{other[0]}:{other[1]}" if other else bound
        known = name in patched[module].names or f"{module}.{name}" in patched
        if not known or bound not in (None, meant):
            problems.append(f"{target} takes {name} from {module}, wrongly")
    return list(dict.fromkeys(problems))


def _unit(place: str) -> str:
    return place.partition(":")[2]


def _top(place: str) -> str:
    return _unit(place).partition(".")[0]


def check(patch: Patch, at_hand: list[Source]) -> list[str]:
    """What is wrong with the stored forms of a patch; nothing, if all is well.

    Each form is put on the vLLM of its version, and the newest on every other vLLM at
    hand that has no form of its own.
    """
    forms_of = forms.stored(patch)
    if not forms_of:
        return [f"{patch.name} has no upstream form: patches/{patch.name}/v*.patch"]
    try:
        declared = prose(patch)
    except BadPatchError as error:
        return [str(error)]
    problems: list[str] = []
    changed: set[str] = set()
    versions = {source.version for source in at_hand}
    problems += [
        f"{patch.name}/{path.name}: there is no vLLM {label} here to put it on; "
        "name one with --vllm"
        for label, path in forms_of.items()
        if label not in versions
    ]
    for source in at_hand:
        path = _form(patch, source)
        exact = forms_of.get(source.version) == path
        try:
            found, seen = _examine(patch, declared, mail.read(path), source, exact)
        except (BadPatchError, SourceError) as error:
            found, seen = [str(error)], set(declared.by_hand)
        changed |= seen
        where = f"{patch.name}/{path.name} on vLLM {source.version}"
        problems += [f"{where}: {problem}" for problem in found]
    problems += [
        f"{patch.name}: `by_hand` in upstream.py names {target}, which no form "
        "changes, or which is the plugin's own"
        for target in declared.by_hand
        if target not in changed
    ]
    return problems


def _examine(
    patch: Patch, declared: Upstream, form: Mail, source: Source, exact: bool
) -> tuple[list[str], set[str]]:
    """Problems of one form on one vLLM, and what of it was finished by hand."""
    problems = []
    if form.subject != patch.summary:
        problems.append(f"its subject is not the patch's summary: {form.subject}")
    if not form.message:
        problems.append("it has no message")
    if "signed-off-by:" in form.message.lower():
        problems.append("only the person who sends it can sign it off")
    source = beneath(declared, source)
    changes = forms.apply(form, source, exact)
    for change in changes:
        if change.path.endswith(".py"):
            try:
                compile(change.after, change.path, "exec", dont_inherit=True)
            except SyntaxError as error:
                return [*problems, f"{change.path} does not compile: {error}"], set()
    problems += lint(form, changes)
    binding = bind(patch, declared, changes, source)
    problems += binding.problems
    if exact and not binding.problems:
        problems += _stale(form.stamps, binding.stamps, patch)
    return problems, set(binding.by_hand)


def _stale(have: dict[str, str], want: dict[str, str], patch: Patch) -> list[str]:
    changed = [key for key in {**have, **want} if have.get(key) != want.get(key)]
    again = f"compare, mend, then `vllm-ext export --stamp {patch.name}`"
    if changed and not have:
        return [f"nobody has said that it was compared with the plugin's code: {again}"]
    return [
        f"{key.partition(' ')[2]} ({key.partition(' ')[0]}) is not what it was when "
        f"the form was finished by hand: {again}"
        for key in changed
    ]


def lint(form: Mail, changes: list[Changed]) -> list[str]:
    """What vLLM's own checks would refuse, of what is decidable by reading."""
    problems = []
    texts = {change.path: change for change in changes}
    for file in form.files:
        if not file.path.endswith(".py"):
            continue
        if file.is_new and tuple(file.added[:2]) != SPDX:
            problems.append(f"{file.path} does not begin with vLLM's two SPDX lines")
        wide = [line for line in file.added if len(line) > WIDTH]
        problems += [f"{file.path} has a line over {WIDTH} columns" for _ in wide[:1]]
        before = texts[file.path].before
        for pattern, wanted in (*REFUSED, NO_CUDA) if file.is_code else REFUSED:
            refused = {
                match[0].strip()
                for line in file.added
                if (match := re.search(pattern, line)) and match[0] not in before
            }
            problems += [f"{file.path}: `{it}`: {wanted}" for it in sorted(refused)]
    return problems


def stamp(patch: Patch, at_hand: list[Source]) -> list[Path]:
    """Write the stored forms anew, saying that both sides have been compared.

    Returns:
        The files that changed.

    Raises:
        BadPatchError: A form has other problems than its stamps, or has no vLLM of
            its version here. Nothing has been written then.
    """
    declared = prose(patch)
    by_version = {source.version: source for source in at_hand}
    written: dict[Path, str] = {}
    for label, path in forms.stored(patch).items():
        if label not in by_version:
            raise BadPatchError(
                f"{path.name}: there is no vLLM {label} here; name one with --vllm"
            )
        form = mail.read(path)
        source = beneath(declared, by_version[label])
        changes = forms.apply(form, source, exact=True)
        binding = bind(patch, declared, changes, source)
        if binding.problems:
            raise BadPatchError(f"{patch.name}/{path.name}: {binding.problems[0]}")
        stamped = Mail(patch.summary, form.message, form.files, binding.stamps)
        if stamped.text() != path.read_text("utf-8"):
            written[path] = stamped.text()
    if not forms.stored(patch):
        raise BadPatchError(f"{patch.name} has no upstream form to stamp")
    for path, text in written.items():
        path.write_text(text, "utf-8")
    return list(written)
