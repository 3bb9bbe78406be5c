"""Search space of CIFAR-10's residual conv net."""

from hpo import Choice, Float, Group, Int, Space

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
    Group(
        "fine tuning",
        closed=True,
        beta1=Float(0.8, 0.99, default=0.9, when={"optimizer": ("adam", "adamw", "nadam")}),
        beta2=Float(0.9, 0.9999, default=0.999, when={"optimizer": ("adam", "adamw", "nadam")}),
        eps=Float(1e-10, 1e-3, log=True, default=1e-8, when={"optimizer": ("adam", "adamw", "nadam")}),
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        clip_norm=Float(0.0, 10.0, default=0.0),
        ema_decay=Float(0.0, 0.999, default=0.0),
        init=Choice("auto", "glorot", "he", "lecun", "orthogonal", "lsuv", default="auto"),
        norm=Choice("none", "batch", "layer", "group", default="batch"),
        norm_first=Choice(True, False, default=True),
        dropout_type=Choice("dropout", "spatial", "dropblock", default="dropout"),
        stochastic_depth=Float(0.0, 0.5, default=0.0),
        augment_strength=Float(0.1, 1.0, default=0.5),
        mixup=Float(0.0, 1.0, default=0.0),
        cutmix=Float(0.0, 1.0, default=0.0),
    ),
)
