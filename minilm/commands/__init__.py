"""Programs: `recipe` runs a configuration from the command line, and `main` is the `minilm` command.

`evaluate`, `report`, `export`, `doctor`, `dry_run`, `seeds` and `completion` are each one command or flag.
`subcommands` and `text_input` serve `main`, `charts` serves `report`, and `job_pool` and `suite_…` serve `suite`. Begin
with `recipe`.
"""
