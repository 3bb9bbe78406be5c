"""Search space of the U-Net for pasted clothes."""

from hpo import Choice, Float, Group, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 0.1, log=True, default=3e-3),
        batch_size=Choice(32, 64, 128, default=64),
    ),
    Group(
        "architecture and optimizer",
        width=Choice(8, 16, 32, default=16),
        depth=Choice(1, 2, 3, default=2),
        activation=Choice("relu", "silu", "gelu", default="relu"),
        norm=Choice("none", "batch", "group", default="batch"),
        loss=Choice("cross_entropy", "dice", "focal", default="cross_entropy"),
        optimizer=Choice("sgd", "adamw", default="adamw"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        schedule=Choice("constant", "cosine", "one_cycle", default="cosine"),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.0),
        weight_decay=Float(1e-6, 1e-1, log=True, default=1e-3),
    ),
    Group(
        "fine tuning",
        closed=True,
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        clip_norm=Float(0.0, 10.0, default=0.0),
        ema_decay=Float(0.0, 0.999, default=0.0),
    ),
)
