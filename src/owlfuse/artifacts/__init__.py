"""The form in which models leave owlfuse and come back: a folder that transformers and peft read.

See `export`.
"""
