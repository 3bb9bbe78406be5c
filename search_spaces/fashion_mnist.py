"""Search space of Fashion-MNIST's MLP."""

from hpo import Choice, Float, Group, Int, Space

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
    Group(
        "fine tuning",
        closed=True,
        beta1=Float(0.8, 0.99, default=0.9, when={"optimizer": ("adam", "adamw", "nadam")}),
        beta2=Float(0.9, 0.9999, default=0.999, when={"optimizer": ("adam", "adamw", "nadam")}),
        eps=Float(1e-10, 1e-3, log=True, default=1e-8, when={"optimizer": ("adam", "adamw", "nadam", "rmsprop")}),
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        clip_norm=Float(0.0, 10.0, default=0.0),
        ema_decay=Float(0.0, 0.999, default=0.0),
        init=Choice("auto", "glorot", "he", "lecun", "orthogonal", "lsuv", default="auto"),
        norm_first=Choice(True, False, default=True),
        dropout_type=Choice("dropout", "dropconnect", default="dropout"),
        augment_strength=Float(0.1, 1.0, default=0.5),
        mixup=Float(0.0, 1.0, default=0.0),
        cutmix=Float(0.0, 1.0, default=0.0),
    ),
)
