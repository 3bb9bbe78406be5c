"""From a finished study to a model in use: crown the winner, test it once, load it."""
