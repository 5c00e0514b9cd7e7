"""owlfuse: experiments on multimodal LLMs of the mPLUG-Owl family."""

__version__ = "0.1.0"
