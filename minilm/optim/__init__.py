"""The optimizer and the learning rate.

`optimizer` builds AdamW or Muon, with groups of parameters for weight decay and layer decay. Read it first. `muon` is
the optimizer Muon. `weight_matrices` finds its matrices, by a forward that `weight_usage` follows. `schedule` computes
the learning rate of a step. `averages` keeps exponential averages of the weights. `parameter_depth` finds the depth of
each parameter for the layer decay.
"""
