"""Training objectives, each with an exact evaluation: masked LM, causal LM, chats, classes, tags, embeddings, answers.

Read `objective` first: its base class lists what an objective may provide. `factory` builds the objective, the data and
the model of a configuration. `masking` draws the masks, and `language_modeling` holds what masked and causal LM share.
`evaluator` is the interface of an evaluation, `evaluation` runs a model on the evaluation examples, and `metrics`
computes the figures.
"""
