"""The classes by which transformers reads an exported model."""
