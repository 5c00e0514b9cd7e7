"""Makes transformers' Auto classes know owlfuse's models, without importing transformers before
anybody does."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."
MODULES = ("configuration_auto", "modeling_auto", "image_processing_auto", "processing_auto")
pending: list[str] = []
"""Modules of transformers that have been imported and do not know owlfuse yet."""


def register(name: str) -> None:
    """Registers with the Auto class of one module of transformers."""
    from owlfuse.artifacts.hf.configuration import OwlfuseConfig

    if name == "configuration_auto":
        from transformers.models.auto.configuration_auto import AutoConfig

        AutoConfig.register(OwlfuseConfig.model_type, OwlfuseConfig, exist_ok=True)
    elif name == "modeling_auto":
        from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

        from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration

        AutoModelForImageTextToText.register(
            OwlfuseConfig, OwlfuseForConditionalGeneration, exist_ok=True
        )
    elif name == "image_processing_auto":
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor

        by_backend: dict[str, Any] = {
            "image_processor_classes": dict.fromkeys(("pil", "torchvision"), OwlfuseImageProcessor)
        }
        # before 5.2x
        if (
            "image_processor_classes"
            not in inspect.signature(AutoImageProcessor.register).parameters
        ):
            by_backend = {"slow_image_processor_class": OwlfuseImageProcessor}
        AutoImageProcessor.register(OwlfuseConfig, **by_backend, exist_ok=True)
    else:
        from transformers.models.auto.processing_auto import AutoProcessor

        from owlfuse.artifacts.hf.processing import OwlfuseProcessor

        AutoProcessor.register(OwlfuseConfig, OwlfuseProcessor, exist_ok=True)


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it hands on what the other finders find, to do the pending
    registrations after an import. They import owlfuse's models, so they wait until no module of
    owlfuse is half imported."""

    def __init__(self) -> None:
        self.half_imported = 0

    @classmethod
    def install(cls) -> None:
        """Registers with what transformers has imported already, and with the rest as soon as it
        is imported."""
        finder = cls()
        sys.meta_path.insert(0, finder)
        pending.extend(name for name in MODULES if AUTO + name in sys.modules)
        finder.imported()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if not fullname.startswith("owlfuse.") and fullname.removeprefix(AUTO) not in MODULES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(
            filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None
        )
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, self)
        return spec

    def imported(self) -> None:
        """A module has run."""
        while pending and not self.half_imported:
            register(pending.pop(0))


class Loader(importlib.abc.Loader):
    """The loader that was found, in all but that it tells when the module has run."""

    def __init__(self, loader: importlib.abc.Loader, finder: AfterImport) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See `importlib.abc.Loader`."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        ours = module.__name__.startswith("owlfuse.")
        self.finder.half_imported += ours
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.half_imported -= ours
        if not ours:
            pending.append(module.__name__.removeprefix(AUTO))
        self.finder.imported()
