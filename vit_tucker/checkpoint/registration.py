"""Patched models in timm's registry as soon as both packages are imported, in whichever order, at no cost."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def vit_tucker_patched(pretrained: bool = False, **kwargs: Any) -> Any:
    """Makes a patched model: the entrypoint in timm's registry, which finds it by this very name."""
    from vit_tucker.checkpoint.entry import patched_model

    return patched_model(pretrained, **kwargs)


def register_with_timm() -> None:
    """Registers the entrypoint now if timm is there, else as soon as it is."""
    if hasattr(sys.modules.get("timm"), "create_model"):
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    from timm.models import register_model

    register_model(vit_tucker_patched)


class _AfterTimm:
    """A finder of modules that waits for the import of timm, once; without importlib.abc, which takes half of our import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec that the others find, with the registration after the module's own code."""
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
