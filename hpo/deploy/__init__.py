"""From a finished study to a model in use: load the winner, or any trial."""
