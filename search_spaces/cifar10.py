"""Search space of CIFAR-10's residual conv net."""

from hpo.space import Choice, Float, Group, Int, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=0.1),
        batch_size=Choice(64, 128, 256, 512, default=128),
    ),
    Group(
        "architecture and optimizer",
        width=Choice(32, 64, 128, default=64),
        blocks=Int(1, 3, default=1),
        activation=Choice("relu", "silu", "gelu", default="relu"),
        optimizer=Choice("sgd", "adam", "adamw", "nadam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        schedule=Choice("constant", "cosine", "one_cycle", default="one_cycle"),
    ),
    Group(
        "regularization",
        augment=Choice("none", "flip", "crop+flip", "crop+flip+cutout", default="flip"),
        weight_decay=Float(1e-6, 1e-2, log=True, default=5e-4),
        label_smoothing=Float(0.0, 0.2, default=0.0),
        dropout=Float(0.0, 0.5, default=0.0),
    ),
)
