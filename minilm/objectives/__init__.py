"""What a model is trained for: masked LM, causal LM and classification, each with its exact evaluation.

`objective` says what an objective must have. `masked_lm` draws the masks. `language_modeling` is what masked and causal
LM share. `evaluation` adds up the loss of language models, and `metrics` computes the figures of classifiers.
"""
