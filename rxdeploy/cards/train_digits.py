"""Train the card digits_resnext14_8x8d: a small ResNeXt on the UCI handwritten digits.

It gives the whole pipeline a trained model and real images without a download. Architecture and input come from
the card, and images reach the model as in deployment: `transform` to the card's size, then `normalise`. Nothing is
chosen by the held-out digits: the weights are those after the last step, and the held-out part is looked at once,
afterwards.

``python -m rxdeploy.cards.train_digits`` writes the weights to the current folder and prints what the card says
about them. The same machine, PyTorch and number of threads give the same bytes; elsewhere sums round differently,
and the weights are others of about the same accuracy.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from rxdeploy.atomic import write_bytes
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.cards.digits_images import Digits, split
from rxdeploy.errors import RxDeployError, from_os_error
from rxdeploy.export.module import ResNeXt
from rxdeploy.runtime.preprocess import normalise, transform

CARD = "digits_resnext14_8x8d"
EPOCHS = 60
BATCH = 64
LEARNING_RATE = 3e-3  # at the peak of the one-cycle schedule
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1

# How far augmentation goes: a shift of 0.1 is 0.8 of the data set's pixels.
SHIFT = 0.1  # of the image's side
ROTATION = math.radians(12)
SCALE = 0.12
SHEAR = 0.15
CONTRAST = 0.2
NOISE = 0.06  # standard deviation, of values 0..1, at the data set's own resolution


def enlarge(digits: Digits, card: ModelCard) -> NDArray[np.uint8]:
    """The digits through the card's evaluation transform: uint8 (n, image_size, image_size, 3)."""
    inputs = card.input
    return np.stack(
        [
            transform(Image.fromarray(image), inputs.image_size, inputs.crop_pct, inputs.interpolation)
            for image in digits.images
        ]
    )


def model_input(images: NDArray[np.uint8], card: ModelCard) -> Tensor:
    """uint8 (n, size, size, 3) to the model's float32 (n, 3, size, size)."""
    return torch.from_numpy(normalise(images, card.input.mean, card.input.std))


def augment(images: NDArray[np.uint8], random: torch.Generator) -> NDArray[np.uint8]:
    """Each image moved, turned, scaled, sheared, and its contrast changed, a little; uint8 (n, size, size, 3)."""
    count, size = images.shape[:2]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=random) * 2 - 1) * limit

    angle, scale, shear = uniform(ROTATION), 1 + uniform(SCALE), uniform(SHEAR)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # Coordinates run from -1 to 1, so the side is 2. What comes in from outside is zero, the background's black.
    rows = (cos, shear * cos - sin, uniform(2 * SHIFT), sin, shear * sin + cos, uniform(2 * SHIFT))
    theta = torch.stack(rows, 1).view(count, 2, 3)
    grey = torch.from_numpy(images[:, None, :, :, 0] / np.float32(255))
    grey = F.grid_sample(grey, F.affine_grid(theta, list(grey.shape), align_corners=False), align_corners=False)
    noise = F.interpolate(torch.randn(count, 1, 8, 8, generator=random) * NOISE, size=(size, size), mode="bicubic")
    grey = (grey * (1 + uniform(CONTRAST))[:, None, None, None] + noise).clamp(0, 1)
    return (grey * 255).round().to(torch.uint8)[:, 0, :, :, None].expand(-1, -1, -1, 3).numpy()


def train(digits: Digits, card: ModelCard, seed: int, epochs: int) -> ResNeXt:
    """The card's model, trained on `digits` from random weights; in evaluation mode."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)  # for the initial weights
    random = torch.Generator().manual_seed(seed)
    model = ResNeXt(card).train()
    images, labels = enlarge(digits, card), torch.from_numpy(digits.labels)

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]  # of batch-norms, and fc.bias
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    # Only whole batches, as a batch-norm's statistics of a few images are poor; the order changes every epoch.
    batches = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=epochs * batches)
    for epoch in range(epochs):
        started, losses = time.monotonic(), []
        order = torch.randperm(len(labels), generator=random)[: batches * BATCH]
        for batch in order.view(batches, BATCH):
            logits = model(model_input(augment(images[batch.numpy()], random), card))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {time.monotonic() - started:.1f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def accuracy(model: ResNeXt, digits: Digits, card: ModelCard) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on `digits` in percent."""
    best = model(model_input(enlarge(digits, card), card)).topk(5).indices
    hits = best == torch.from_numpy(digits.labels)[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(1).float().mean().item()


def write_weights(model: ResNeXt, path: Path) -> bytes:
    """Write the model's tensors to the safetensors file `path`, whole or not at all; returns its content."""
    state = model.state_dict()
    content = save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    try:
        write_bytes(path, content)
    except OSError as error:
        raise from_os_error(error, f"writing {path}") from None
    return content


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rxdeploy.cards.train_digits", description=f"Train {CARD} and write its weights."
    )
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR", help="default: the current folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and augmentation")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: at least one is needed")
    try:
        card = find_card(CARD)
        digits, held_out = split()
        started = time.monotonic()
        model = train(digits, card, args.seed, args.epochs)
        print(f"trained in {time.monotonic() - started:.0f} s")
        path = args.output / f"{CARD}.safetensors"
        content = write_weights(model, path)
    except RxDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, part in ("training", digits), ("held-out", held_out):
        top1, top5 = accuracy(model, part, card)
        print(f"{name} digits ({len(part.labels)}): top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    print(f"{path}: for the card,")
    print(f"  file_size = {len(content):_}")
    print(f'  sha256_prefix = "{hashlib.sha256(content).hexdigest()}"')
    print(f"  parameters = {sum(parameter.numel() for parameter in model.parameters()):_}")
    print(f"  top1 = {top1:.2f}")
    print(f"  top5 = {top5:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
