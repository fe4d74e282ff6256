"""Sub-commands: each file has `EXAMPLE`, `add_arguments(parser)` and `run(arguments) -> (JSON object, exit code)`."""
