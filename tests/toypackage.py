"""A small package to patch, made anew for each test: none of this needs vLLM."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

from vllm_ext.patching.declare import Edit, Patch
from vllm_ext.patching.engine import Engine
from vllm_ext.patching.fingerprint import Known, Source, fingerprint

FILES = {
    "toy/__init__.py": "",
    "toy/_version.py": '__version__ = version = "1.2.0"\n',
    "toy/ops.py": """
        def scale(x):
            '''Twice.'''
            return 2 * x

        def shift(x):
            return x + 1

        def broken(x):
            raise ValueError("from stock")

        class Sampler:
            kind = "stock"

            def __init__(self, bias=0):
                self.bias = bias

            def sample(self, x):
                return scale(x) + self.bias

            @staticmethod
            def half(x):
                return x / 2

            @classmethod
            def make(cls, bias):
                return cls(bias)
    """,
    "toy/runner.py": """
        from toy.ops import Sampler, scale, shift

        def step(x):
            return shift(scale(x))

        def sample(x, bias=0):
            return Sampler(bias).sample(x)
    """,
    # What vLLM's dispatcher does, as far as the engine depends on it.
    "toy/triton_utils/__init__.py": "",
    "toy/triton_utils/dispatcher.py": """
        import importlib
        import sys
        
        _registry = {}

        class Override:
            def __init__(self, impl):
                self.impl = impl

            def __getitem__(self, grid):
                return self.impl

        def register_kernels(overrides):
            for name, impl in overrides.items():
                module, attr = name.rsplit(".", 1)
                host = importlib.import_module(module)
                original, wrapper = getattr(host, attr), Override(impl)
                _registry[name] = (original, impl)
                for other in list(sys.modules.values()):
                    for key, value in list(getattr(other, "__dict__", {}).items()):
                        if value is original:
                            setattr(other, key, wrapper)
                        elif getattr(value, "__dict__", {}).get("kernel") is original:
                            value.kernel = wrapper
    """,
    "toy/kernels.py": """
        class Jit:
            def __init__(self, fn):
                self.fn = fn

            def __getitem__(self, grid):
                return self.fn

        @Jit
        def add_kernel(x, y):
            return x + y

        class WarmUp:
            def __init__(self, kernel):
                self.kernel = kernel
                self._kernel_arg_names = ("x", "y")

        warm_up = WarmUp(add_kernel)
    """,
    "toy/launch.py": """
        from toy.kernels import add_kernel

        def launch(x, y):
            return add_kernel[(1,)](x, y)
    """,
    # Ours.
    "ours/__init__.py": "",
    "ours/replacement.py": """
        def scale(x):
            return x + x

        def shift(x):
            return 1 + x

        def logged(original):
            def wrapper(*args, **kwargs):
                calls.append(args)
                return original(*args, **kwargs)
            return wrapper

        calls = []

        def fails(x):
            raise RuntimeError("a fault of ours")

        def add(x, y):
            return y + x

        def half(x):
            return x * 0.5

        def make(original):
            def wrapper(cls, bias):
                return original(cls, bias + 100)
            return wrapper
    """,
    "ours/subclass.py": """
        from toy.ops import Sampler

        class Ours(Sampler):
            kind = "ours"

            def sample(self, x):
                if x is None:
                    raise RuntimeError("a fault of ours")
                return super().sample(x)

        class Stranger:
            pass
    """,
    "ours/raises.py": "raise ImportError('no such luck')\n",
    # Somebody else's.
    "foreign.py": """
        import functools

        def patch(module, name):
            stock = getattr(module, name)

            @functools.wraps(stock)
            def theirs(*args, **kwargs):
                return stock(*args, **kwargs)

            setattr(module, name, theirs)
            return theirs
    """,
}


class Toy:
    """The package on disk, and engines for it."""

    def __init__(self, root: Path):
        self.root = root
        self.source = Source(root, "toy")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def edit(self, name: str, old: str, new: str) -> None:
        """Change one file of the package, as another release would."""
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new))
        self.source = Source(self.root, "toy")

    def known(self, *patches: Patch) -> Known:
        return {
            target: {"1.2.0": fingerprint(self.source, target) or "gone"}
            for patch in patches
            for target in patch.watched
        }

    def engine(self, *patches: Patch, **options: object) -> Engine:
        return Engine(self.source, self.known(*patches), **options)  # type: ignore[arg-type]

    @staticmethod
    def load(name: str):
        return importlib.import_module(name)


def patch_of(*edits: Edit, name: str = "demo", **fields: object) -> Patch:
    """A patch with these edits and nothing remarkable about it."""
    text = dict(summary="A demonstration", why="For tests.", retire_when="Never.")
    return Patch(name=name, edits=edits, **{**text, **fields})  # type: ignore[arg-type]


def write_package(root: Path) -> Path:
    """Write the toy package and its neighbours below ``root``."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root
