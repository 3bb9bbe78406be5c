"""Search space of a table's network."""

from hpo import Choice, Float, Group, Int, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 0.03, log=True, default=2e-3),
        batch_size=Choice(16, 32, 64, default=32),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(1, 4, default=2),
        width=Int(16, 256, log=True, default=64),
        residual=Choice(True, False, default=False),
        embedding=Choice(4, 8, 16, default=8),
        optimizer=Choice("sgd", "adamw", default="adamw"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        schedule=Choice("constant", "cosine", "one_cycle", default="cosine"),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.1),
        weight_decay=Float(1e-6, 1.0, log=True, default=1e-2),
        clip_norm=Float(0.1, 10.0, log=True, default=1.0),
    ),
    Group(
        "fine tuning",
        closed=True,
        beta1=Float(0.8, 0.99, default=0.9, when={"optimizer": "adamw"}),
        beta2=Float(0.9, 0.9999, default=0.999, when={"optimizer": "adamw"}),
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        ema_decay=Float(0.0, 0.999, default=0.0),
    ),
)
