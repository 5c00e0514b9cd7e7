"""Released checkpoints of mPLUG-Owl1, 2 and 3 and of LLaVA 1.5 in owlfuse, and back: `loading.load`
gives a folder's `MultimodalLM`, and `saving.save` writes it in the released layout."""
