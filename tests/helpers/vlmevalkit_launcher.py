"""The launcher of VLMEvalKit as a script that does without torchvision.

VLMEvalKit imports torchvision for models and datasets that are not asked here. Where it is not installed, an inert
package takes its place, so that everything else is the real one.
"""

import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

from transformers.utils import is_torchvision_available


class Anything(type):
    """A class with any attribute."""

    def __getattr__(cls, name):
        return attribute(name)


class Inert(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        return attribute(name)


def attribute(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return Inert(spec.name)

    def exec_module(self, module):
        pass


if __name__ == "__main__":
    if not is_torchvision_available():  # transformers keeps this answer, so that it does not use what is inert
        sys.meta_path.append(Finder())
    from llava_cot.evaluate.plugins.vlmevalkit import main

    main()
