"""From files and the hub to micro-batches: rows, documents, labels, token ids on disk, the plan of batches, packing.

Begin with `documents`, which returns texts. Then read `tokenizer` and `corpus`, which encode them, and `batch_plan`,
which decides the batches and their padding. `sources` finds files and datasets; `delimited_files` reads .csv and .tsv.
"""
