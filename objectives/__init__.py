"""Tasks that ship with hpo: one module each, with an `objective`."""
