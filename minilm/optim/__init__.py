"""The optimizer and the learning rate.

`optimizer` builds AdamW with its parameter groups for weight decay and layer decay. `schedule` computes the learning
rate of a step. `parameter_depth` finds the depth of each parameter for the layer decay.
"""
