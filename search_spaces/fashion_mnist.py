"""Search space of Fashion-MNIST's MLP."""

from hpo.space import Choice, Float, Group, Int, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 0.3, log=True, default=3e-3),
        batch_size=Choice(128, 256, 512, 1024, default=512),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(1, 6, default=2),
        width=Int(64, 512, log=True, default=256),
        activation=Choice("relu", "silu", "gelu", default="relu"),
        norm=Choice("none", "batch", "layer", default="none"),
        optimizer=Choice("sgd", "adam", "adamw", "nadam", "rmsprop", default="adamw"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": ("sgd", "rmsprop")}),
        schedule=Choice("constant", "cosine", "one_cycle", default="one_cycle"),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.0),
        weight_decay=Float(1e-6, 1e-1, log=True, default=1e-4),
        label_smoothing=Float(0.0, 0.2, default=0.0),
        augment=Choice("none", "flip", "crop+flip", default="none"),
    ),
)
