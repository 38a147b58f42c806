"""Training objectives: masked LM, causal LM and classification, each with an exact evaluation.

Read `objective` first: it lists what an objective must provide. `factory` builds the objective, the data and the model
of a configuration. `masking` draws the masks, and `language_modeling` holds what masked and causal LM share.
`evaluation` runs a model on the evaluation examples, and `metrics` computes the figures.
"""
