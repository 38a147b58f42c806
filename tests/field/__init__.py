"""Situations from the field: real files, labels, tokenizers and checkpoints, each beside the value that is right.

The right value comes from Python's `csv` and `json`, from pyarrow or from plain transformers, never from minilm itself.
Each test belongs to row 31 of the scorecard.
"""
