"""Fire Together Wire Together in its own setting: filters of a small convolutional network, and FLOPs known before fine-tuning."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.reproductions.criterion import Criterion
from launch.reproductions.digits import digits
from modeling.ffn_predicted_mask import mass_mask

CHANNELS = (24, 32, 48)
SIDES = (8, 8, 4)  # height and width of each convolution's output
RATIOS = (0.8, 0.7)
DENSE_STEPS, PREDICTOR_STEPS, TUNED_STEPS = 600, 100, 300


class MaskedConv(nn.Module):
    """Convolution 3 x 3, batch norm, ReLU; filters that the predictor leaves out are zero in the output."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters)
        self.predictor = nn.Linear(inputs, filters)

    def forward(self, x: Tensor, r: float, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`[B, C, H, W]` -> output, predicted mask `[B, F]`, the mask that the responses ask for, the predictor's loss."""
        output = self.norm(self.conv(x)).relu()
        logits = self.predictor(x.detach().mean((2, 3)))
        truth = mass_mask(output.detach().amax((2, 3)), r)
        mask = logits.detach() > 0
        loss = F.binary_cross_entropy_with_logits(logits, truth.float())
        return (output * mask[..., None, None] if masked else output), mask, truth, loss


class SmallCNN(nn.Module):
    """Three masked convolutions on 8 x 8 images, pooled by 2 before the third, mean over space, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MaskedConv(a, b) for a, b in zip((1, *CHANNELS[:-1]), CHANNELS, strict=True))
        self.head = nn.Linear(CHANNELS[-1], 10)

    def forward(self, x: Tensor, r: float, masked: bool) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Logits of `[B, 64]`, predicted and asked-for masks of each layer, and the predictors' mean loss."""
        x = x.view(-1, 1, 8, 8)
        masks, truths, losses = [], [], []
        for index, layer in enumerate(self.layers):
            x = F.max_pool2d(x, 2) if index == 2 else x
            x, mask, truth, loss = layer(x, r, masked)
            masks.append(mask)
            truths.append(truth)
            losses.append(loss)
        return self.head(x.mean((2, 3))), masks, truths, torch.stack(losses).mean()


def reduction(masks: list[Tensor]) -> float:
    """Share of the convolutions' multiplications spared, mean over samples: active_out * H * W * active_in * 9 each."""
    before = torch.ones(len(masks[0]))
    spent, dense, width = torch.zeros(len(masks[0])), 0, 1
    for mask, side, filters in zip(masks, SIDES, CHANNELS, strict=True):
        active = mask.float().sum(1)
        spent += active * before * side * side * 9
        dense += filters * width * side * side * 9
        before, width = active, filters
    return 1.0 - float(spent.mean()) / dense


def fit(net: SmallCNN, steps: int, r: float, masked: bool, backbone: bool, predictors: int) -> None:
    """Adam at 3e-3 on batches of 64; the predictors learn for the first `predictors` steps and then stay as they are."""
    x, y, _, _ = digits()
    generator = torch.Generator().manual_seed(steps)
    gates = [p for name, p in net.named_parameters() if "predictor" in name]
    others = [p for name, p in net.named_parameters() if "predictor" not in name]
    for_gates, for_others = torch.optim.Adam(gates, lr=3e-3), torch.optim.Adam(others, lr=3e-3)
    for step in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        logits, _, _, guess = net(x[batch], r, masked)
        (F.cross_entropy(logits, y[batch]) + guess).backward()  # decoupled: neither reaches the other's parameters
        if backbone:
            for_others.step()
        if step < predictors:
            for_gates.step()
        net.zero_grad(set_to_none=True)


@torch.no_grad()
def look(net: SmallCNN, r: float, masked: bool) -> dict[str, float]:
    """On the test images: accuracy, and the reductions that predicted and asked-for masks give."""
    _, _, x, y = digits()
    net.eval()
    logits, masks, truths, _ = net(x, r, masked)
    net.train()
    accuracy = float((logits.argmax(-1) == y).float().mean())
    return {"accuracy": accuracy, "predicted_reduction": reduction(masks), "asked_reduction": reduction(truths)}


def estimate_criteria() -> list[Criterion]:
    """P2: the reduction that the dense network's responses ask for, before and after fine-tuning under predicted masks."""
    criteria = []
    torch.manual_seed(0)
    dense = SmallCNN()
    fit(dense, DENSE_STEPS, 1.0, masked=False, backbone=True, predictors=0)
    for r in RATIOS:
        net = copy.deepcopy(dense)
        before = look(net, r, masked=False)
        fit(net, PREDICTOR_STEPS, r, masked=False, backbone=False, predictors=PREDICTOR_STEPS)
        fit(net, TUNED_STEPS, r, masked=True, backbone=True, predictors=TUNED_STEPS // 2)
        after = look(net, r, masked=True)
        measured: dict[str, Any] = {"dense": before, "fine_tuned": after}
        near = abs(after["asked_reduction"] - before["asked_reduction"]) <= 0.03
        criteria.append(Criterion(f"CNN, r = {r}: asked reduction before and after", measured, "within 3 points", near))
    return criteria
