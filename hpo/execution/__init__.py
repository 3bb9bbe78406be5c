"""Who runs the trials: a coordinator that asks and tells, and a worker that trains."""
