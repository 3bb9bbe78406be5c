"""Search spaces that ship with hpo: one module a task, each with a `space`."""
