"""Search space of the diabetes regression's MLP."""

from hpo import Choice, Float, Group, Int, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 0.1, log=True, default=3e-3),
        batch_size=Choice(16, 32, 64, 128, default=32),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(1, 4, default=1),
        width=Int(8, 128, log=True, default=32),
        activation=Choice("relu", "silu", "gelu", "tanh", default="relu"),
        norm=Choice("none", "batch", "layer", default="none"),
        optimizer=Choice("sgd", "adam", "adamw", default="adamw"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        schedule=Choice("constant", "cosine", "one_cycle", default="cosine"),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.0),
        weight_decay=Float(1e-6, 1.0, log=True, default=1e-2),
        clip_norm=Float(0.1, 10.0, log=True, default=1.0),
    ),
    Group(
        "fine tuning",
        closed=True,
        beta1=Float(0.8, 0.99, default=0.9, when={"optimizer": ("adam", "adamw")}),
        beta2=Float(0.9, 0.9999, default=0.999, when={"optimizer": ("adam", "adamw")}),
        eps=Float(1e-10, 1e-3, log=True, default=1e-8, when={"optimizer": ("adam", "adamw")}),
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        ema_decay=Float(0.0, 0.999, default=0.0),
        init=Choice("auto", "glorot", "he", "lecun", "orthogonal", "lsuv", default="auto"),
        norm_first=Choice(True, False, default=True),
        dropout_type=Choice("dropout", "dropconnect", default="dropout"),
    ),
)
