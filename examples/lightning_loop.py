"""A Lightning module searched by hpo: needs `pip install 'hpo-torch[lightning]'`."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hpo
from hpo.integrations.lightning import lightning_loop


class Digits(lightning.LightningModule):
    def __init__(self, *, width: int, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.lr = lr

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Data(lightning.LightningDataModule):
    def setup(self, stage: str) -> None:
        digits = load_digits()
        data = TensorDataset(torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target))
        self.train, self.validation = Subset(data, range(1200)), Subset(data, range(1200, 1500))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=300)


objective = hpo.Objective(
    name="lightning_loop",
    description="digits with Lightning",
    train=lightning_loop(lambda trial: Digits(**trial.parameters), lambda trial: Data()),
    metric="accuracy",
    direction="maximize",
    settings={"max_epochs": 6},
    space=hpo.Space(
        hpo.Group("step size", lr=hpo.Float(1e-4, 0.1, log=True, default=3e-3)),
        hpo.Group("architecture", width=hpo.Int(8, 128, log=True, default=32)),
    ),
)
