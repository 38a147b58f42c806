"""The optimizer and the learning rate.

`optimizer` has the parameter groups for weight decay and layer decay, AdamW, and the learning rate as a function of the
step. `parameter_depth` finds the depth of each parameter for the layer decay.
"""
