"""Models of transformers: loading or building one, and running it at the targets of a packed batch.

Begin with `loading`, then read `head`, which returns the losses of a micro-batch. `head` uses most of the others:
`attention`, `fast_modules`, `chunked_loss`, `trials`.
"""
