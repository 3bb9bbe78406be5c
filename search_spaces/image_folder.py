"""Search space of transfer learning on a folder of photos."""

from hpo import Choice, Float, Group, Int, Setting, Space

space = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1e-1, log=True, default=1e-3),
        batch_size=Choice(16, 32, 64, default=32),
    ),
    Group(
        "architecture and optimizer",
        architecture=Choice("mobilenet_v3_large", "resnet18", "resnet50", default="resnet18", is_open=True),
        trainable_layers=Choice(0, 2, -1, default=-1),
        thaw_epoch=Int(0, 6, default=0, when={"trainable_layers": (0, 2)}),
        backbone_lr_factor=Float(0.01, 1.0, log=True, default=0.1),
        optimizer=Choice("sgd", "adamw", default="adamw"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        schedule=Choice("constant", "cosine", "one_cycle", default="cosine"),
    ),
    Group(
        "regularization",
        augment=Choice("none", "flip", "crop+flip", "crop+flip+cutout", default="crop+flip"),
        weight_decay=Float(1e-6, 1e-1, log=True, default=1e-2),
        label_smoothing=Float(0.0, 0.2, default=0.0),
    ),
    Group(
        "fine tuning",
        closed=True,
        weights=Setting("default"),
        image_size=Int(0, 1024, default=0),
        warmup_fraction=Float(0.0, 0.2, default=0.05),
        clip_norm=Float(0.0, 10.0, default=0.0),
        ema_decay=Float(0.0, 0.999, default=0.0),
        augment_strength=Float(0.1, 1.0, default=0.5),
        mixup=Float(0.0, 1.0, default=0.0),
        cutmix=Float(0.0, 1.0, default=0.0),
    ),
)
