"""Data, from files and the hub to micro-batches of token ids.

Begin with `documents`, which reads texts. Then read `corpus`, which encodes them, and `batch_plan`, which decides the
batches and their padding. `sources` opens files and datasets, `delimited_files` reads .csv and .tsv, and `labels` reads
the labels of a classifier.
"""
