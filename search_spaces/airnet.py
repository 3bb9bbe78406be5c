"""Search space of the conv net that learns CIFAR-10 in ten epochs, around the settings of its authors."""

from hpo import Choice, Float, Group, Int, Space

space = Space(
    Group(
        "step size",
        lr=Float(0.05, 5.0, log=True, default=1.5),
        batch_size=Choice(256, 512, 1024, 2048, default=1024),
    ),
    Group(
        "architecture and optimizer",
        width=Int(16, 128, log=True, default=64),
        optimizer=Choice("sgd", "muon", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.85),
        schedule=Choice("cosine", "one_cycle", default="one_cycle"),
    ),
    Group(
        "regularization",
        augment=Choice(
            "alternating_flip",
            "crop+flip",
            "crop+alternating_flip",
            "crop+alternating_flip+cutout",
            default="crop+alternating_flip",
        ),
        weight_decay=Float(1e-5, 1e-2, log=True, default=1.3e-3),
        label_smoothing=Float(0.0, 0.3, default=0.2),
        dropout=Float(0.0, 0.5, default=0.0),
    ),
    Group(
        "fine tuning",
        closed=True,
        warmup_fraction=Float(0.0, 0.3, default=0.05),
        clip_norm=Float(0.0, 10.0, default=0.0),
        ema_decay=Float(0.0, 0.999, default=0.0),
        augment_strength=Float(0.1, 1.0, default=0.5),
        mixup=Float(0.0, 1.0, default=0.0),
        cutmix=Float(0.0, 1.0, default=0.0),
    ),
)
