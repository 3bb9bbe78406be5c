"""A training loop of your own: the search asks for a trial, and the loop reports each epoch."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hpo

data = load_digits()
images, digits = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)  # (1797, 64), (1797,)
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
TRAIN, VALIDATION, TEST = order[:1200], order[1200:1500], order[1500:]


def build(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def accuracy(model: nn.Module, part: torch.Tensor) -> float:
    device = next(model.parameters()).device
    return (model(images[part].to(device)).argmax(1).cpu() == digits[part]).float().mean().item()


def train(trial: hpo.Trial) -> None:
    model, epoch = build(trial.parameters["width"]).to(trial.device), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.parameters["lr"], momentum=0.9)
    if state := trial.resume():  # what was saved before this trial was interrupted or killed
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch = state["epoch"]
    while epoch < trial.max_epochs:
        epoch += 1
        for batch in TRAIN[torch.randperm(len(TRAIN))].split(64):
            outputs = model(images[batch].to(trial.device))
            loss = nn.functional.cross_entropy(outputs, digits[batch].to(trial.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trial.save_model(model)  # kept if this epoch is the best so far
        trial.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch})
        if not trial.report(epoch, {"accuracy": accuracy(model, VALIDATION), "train/loss": loss.item()}):
            return  # the trial is pruned, or the search is interrupted


def test(trial: hpo.TrainedTrial) -> dict[str, float]:
    model = build(trial.parameters["width"])
    model.load_state_dict(trial.model)
    return {"accuracy": accuracy(model, TEST)}


objective = hpo.Objective(
    name="own_loop",
    description="digits with a training loop of our own",
    train=train,
    test=test,
    metric="accuracy",
    direction="maximize",
    settings={"max_epochs": 10},
    space=hpo.Space(
        hpo.Group("step size", lr=hpo.Float(1e-3, 1.0, log=True, default=0.1)),
        hpo.Group("architecture", width=hpo.Int(8, 256, log=True, default=32)),
    ),
)
