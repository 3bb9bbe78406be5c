"""Search space of the networks for texts."""

from hpo import Choice, Float, Group, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 0.03, log=True, default=3e-3),
        batch_size=Choice(16, 32, 64, default=32),
    ),
    Group(
        "architecture and optimizer",
        network=Choice("recurrent", "transformer", "convnet1d", default="recurrent"),
        width=Choice(32, 64, 128, 256, default=64),
        depth=Choice(1, 2, 3, default=1),
        optimizer=Choice("adam", "adamw", default="adamw"),
        schedule=Choice("constant", "cosine", "one_cycle", default="cosine"),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.6, default=0.3),
        weight_decay=Float(1e-6, 1.0, log=True, default=1e-2),
        clip_norm=Float(0.1, 10.0, log=True, default=1.0),
    ),
    Group(
        "fine tuning",
        closed=True,
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        label_smoothing=Float(0.0, 0.2, default=0.0),
        ema_decay=Float(0.0, 0.999, default=0.0),
    ),
)
