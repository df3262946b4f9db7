"""The commands of `sparse-ds` besides training, one file each: `add_arguments`, then `run`.

Importing them is cheap; `run` imports what it needs. A `UserError` or `RuntimeError` becomes one line and exit code 2.
"""
