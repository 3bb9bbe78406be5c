"""Training loops of other frameworks as `Objective(train=...)`: each module needs the extra of its name."""
