"""What a patch is: data, with no import of vLLM, torch or the replacement code."""

from dataclasses import dataclass
from typing import Literal

How = Literal["replace", "wrap", "subclass", "kernel"]


@dataclass(frozen=True)
class Edit:
    """One change to one upstream object.

    Attributes:
        target: The upstream object, as ``"package.module:Qualified.name"``.
        by: What takes its place, in the same form. Imported in the process that
            needs it, right after ``target``'s own module has been.
        how: ``replace`` puts ``by`` there. ``wrap`` puts ``by(original)`` there.
            ``subclass`` puts the class ``by`` there, which must derive from the
            original. ``kernel`` puts ``by`` behind a launched Triton kernel, through
            vLLM's own ``register_kernels``.
        guard: Note an error that passes through, and the first call. ``False`` for
            code inside a ``torch.compile``d region, which must see ``by`` itself.
    """

    target: str
    by: str
    how: How = "replace"
    guard: bool = True

    @property
    def module(self) -> str:
        """The module whose import makes the edit possible."""
        return self.target.partition(":")[0]


@dataclass(frozen=True)
class Patch:
    """A named set of edits that are applied together or not at all.

    Attributes:
        name: Its folder's name; what settings, logs and reports call it.
        summary: One line, in the form of an upstream commit title.
        why: What stock does, what that costs, and which rung of the ladder in
            CONTRIBUTING.md this is, and why not the one before.
        retire_when: What has to happen upstream for the folder to be deleted.
        edits: The changes.
        relies_on: Upstream objects that the replacements lean on without touching:
            a change of theirs stops the patch as a change of a target does.
        after: Modules that must have been imported too, though no edit is in them.
            Names the process that a patch is for where its targets are imported in
            others as well, such as the frontend.
        since: When it came, as ``YYYY-MM-DD``: what its age is counted from.
        tested_with: vLLM versions on which its tests have run.
        upstream: Address of the pull request or issue, once there is one.
        merged_in: First vLLM version that no longer needs it.
        default: Whether it is on without being asked for.
    """

    name: str
    summary: str
    why: str
    retire_when: str
    edits: tuple[Edit, ...]
    relies_on: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    since: str | None = None
    tested_with: tuple[str, ...] = ()
    upstream: str | None = None
    merged_in: str | None = None
    default: bool = True

    @property
    def watched(self) -> tuple[str, ...]:
        """Every upstream object whose change stops this patch."""
        return (*(edit.target for edit in self.edits), *self.relies_on)

    @property
    def from_boot(self) -> bool:
        """Whether an engine has to be built after it to be patched.

        So it is where a class takes the place of one that engines construct.
        """
        return any(edit.how == "subclass" for edit in self.edits)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that must have been imported before it can be applied."""
        edited = (edit.module for edit in self.edits)
        return tuple(dict.fromkeys([*edited, *self.after]))
