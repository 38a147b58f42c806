"""What a run keeps and checks: the output folder, checkpoints, the log, the model card.

Begin with `session`, the beginning and the end of every run. Then read `output_folder`, `checkpoint`, which checks the
hashes of a checkpoint, `checkpoint_saver`, which writes it, `resume` and `recorder`.
"""
