"""Hugging Face's Trainer searched by hpo: needs `pip install 'hpo-torch[transformers]'`; nothing is downloaded.

A small BERT learns whether the first of 12 tokens is from the first half of the vocabulary.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer

import hpo
from hpo.integrations.transformers import TrainerLoop, trial_arguments

VOCABULARY, LENGTH = 24, 12


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = (tokens[:, 0] < VOCABULARY // 2).long()
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def build_model(width: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=2, **sizes)
    return BertForSequenceClassification(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


def build(trial: hpo.Trial) -> Trainer:
    return Trainer(
        build_model(trial.parameters["width"]),
        trial_arguments(trial, learning_rate=trial.parameters["lr"], per_device_train_batch_size=64),
        train_dataset=sequences(1024, seed=0),
        eval_dataset=sequences(256, seed=1),
        compute_metrics=accuracy,
    )


objective = hpo.Objective(
    name="transformers_loop",
    description="sequences of tokens with a small BERT",
    train=TrainerLoop(build),
    metric="accuracy",
    direction="maximize",
    settings={"max_epochs": 5},
    space=hpo.Space(
        hpo.Group("step size", lr=hpo.Float(1e-5, 1e-2, log=True, default=2e-3)),
        hpo.Group("architecture", width=hpo.Int(16, 64, log=True, default=32)),
    ),
)
