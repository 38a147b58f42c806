"""What a run keeps and checks: the output folder, checkpoints, the log, the model card.

Begin with `output_folder`. Then read `checkpoint`, which writes checkpoints and checks their hashes, `resume` and
`recorder`.
"""
