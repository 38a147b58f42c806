"""Programs: `recipe` runs a configuration from the command line, and `main` is the `minilm` command.

`model_commands`, `run_commands` and `training_commands` hold the arguments and the work of each command. Larger work
has a module of its own, such as `evaluate`, `report` and `suite`. `dry_run`, `seeds` and `completion` are each one
flag. `command_arguments` and `text_input` serve several commands, `charts` serves `report`, and `job_pool` and
`suite_…` serve `suite`. Begin with `recipe`.
"""
