"""How patch finds the modules that it knows, and asks what they compute."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ._graph import Unsupported


@dataclass(frozen=True)
class Rule:
    """Classes that compute one pattern: `classes` of the module `defined_in`, looked up only if the user has imported it.

    A subclass says by `mixin` what runs instead, by `ops` what that fuses, and by `read` how to tell from a module.
    """

    defined_in: str
    classes: tuple[str, ...]

    ops: ClassVar[tuple[str, ...]] = ()
    inside_blocks: ClassVar[bool] = True  # whether it applies inside of a block that is another rule's too

    def matches(self, module: nn.Module) -> bool:
        library = sys.modules.get(self.defined_in)
        return library is not None and isinstance(module, tuple(c for c in (getattr(library, n, None) for n in self.classes) if c))

    @property
    def mixin(self) -> type:
        raise NotImplementedError

    def read(self, module: nn.Module) -> tuple[Any, dict[str, tuple[str, str]]]:
        """The layout, and (status, reason) of each op; raises Unsupported."""
        raise NotImplementedError

    def inspect(self, module: nn.Module) -> tuple[Any, dict[str, tuple[str, str]]]:
        """As `read`, in training and in eval mode. Without a layout every op is declined."""
        training = module.training
        try:
            if "forward" in module.__dict__:
                raise Unsupported("its forward is replaced on the instance")
            found = []
            for module.training in (not training, training):
                found.append(self.read(module))
            if found[0] != found[1]:
                raise Unsupported("its forward computes something else in training than in eval mode")
            return found[0]
        except Unsupported as error:
            return None, dict.fromkeys(self.ops, ("declined", str(error)))
        finally:
            module.training = training
