"""From a finished study to a model in use: it is loaded, exported, registered, served, or asked for predictions."""
