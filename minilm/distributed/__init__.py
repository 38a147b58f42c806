"""Several processes and the hardware: launching, sharding, precision, FLOPs.

Begin with `launch`, where a process joins its job and leaves it. `sharding` is FSDP2, and `hardware` measures the
machine.
"""
