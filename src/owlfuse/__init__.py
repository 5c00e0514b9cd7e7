"""owlfuse: experiments on multimodal LLMs of the mPLUG-Owl family.

After `import owlfuse`, transformers' Auto classes and pipelines read what `owlfuse export` writes.
"""

from owlfuse.hub.registration import AfterImport

__version__ = "0.1.0"


def load(folder):
    """The `MultimodalLM` of a folder that `owlfuse export` or `owlfuse import` wrote, in eval mode on the CPU, a LoRA adapter
    applied. Raises DataError (a ValueError) where the folder is no such one or damaged."""
    from owlfuse.hub.export import load_exported

    return load_exported(folder)[0].model


AfterImport.install()
