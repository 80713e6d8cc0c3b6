"""What `cosmos3` does, one file a command. A command reads the configuration before it imports anything heavy.

Each command's file has `run(...) -> int`, the exit code; `cli.py` parses the line and calls it. `delivery` (export and
report of a run) and `runs` (finding one again) are shared by several commands.
"""
