"""Tools that know nothing of models: atomic files, the cache, the hub, local files, progress bars, signals, checks.

They import nothing else of minilm. Begin with `atomic_files`, which writes all files, and `cache`.
"""
