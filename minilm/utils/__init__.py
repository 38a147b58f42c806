"""Tools without knowledge of models: files, the cache, the hub, launch variables, signals, output, checks of values.

These modules import nothing else of minilm. Begin with `atomic_files`, which writes all files, and `cache`.
"""
