"""Programs: `recipe` runs a configuration from the command line, and `main` is the `minilm` command.

Each other module is one command or flag: `evaluate`, `report`, `export`, `doctor`, `dry_run`, `seeds`.
"""
