"""One session of `hpo search`, `submit` or `worker`, from what was asked to the winner."""
