"""A walk over a model's modules that costs little: every trace takes several."""

from __future__ import annotations

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """A module and all below it, each once, parents first, as ``root.modules()`` gives them."""
    found: dict[int, nn.Module] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in module._modules.values() if child is not None][::-1]
    return list(found.values())


def name_of(module: nn.Module, root: nn.Module) -> str:
    """Where a module is below ``root``; empty for ``root`` itself."""
    return next(name for name, one in root.named_modules() if one is module)  # type: ignore[no-any-return]
