"""Load or build a model of transformers, and compute its losses at the targets of a packed batch.

Begin with `loading`, then read `head` and `sparse_head`, which computes the losses of a micro-batch. `sparse_head` uses
most of the others: `shortcut_trials`, `model_inputs`, `attention`, `fast_modules`, `chunked_loss`.
"""
