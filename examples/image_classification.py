"""Train an image classifier with routed attention on real images, and see where its heavy branch
looks.

    python examples/image_classification.py                        # digits in 192x192 canvases,
    minutes on a CPU python examples/image_classification.py --resume               # go on after an
    interruption python examples/image_classification.py --data FOLDER          # your own images,
    one sub-folder a class torchrun --nproc-per-node 2 examples/image_classification.py

Leaves in --output: checkpoint/ (safetensors), history.json, results.md, curve.png, routing.png.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

import colt5_vision.models  # noqa: F401  (registers colt5_* with timm)
from colt5_vision.visualize import plot_routing, record_routing
from support.command_line import UserError, at_least_one, exit_status
from support.digits import DigitCanvases


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class ImageFolderSplit(Dataset):
    """Images of ``root`` in torchvision's ``ImageFolder`` layout, resized and cropped to a
    square."""

    def __init__(self, root: Path, size: int, train: bool):
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        crop = [transforms.RandomResizedCrop(size, (0.5, 1.0)), transforms.RandomHorizontalFlip()]
        fixed = [transforms.Resize(size), transforms.CenterCrop(size)]
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        transform = transforms.Compose(
            [*(crop if train else fixed), transforms.ToTensor(), normalize]
        )
        try:
            self.folder = ImageFolder(str(root), transform, loader=read_image)
        except FileNotFoundError as error:
            raise UserError(
                f"--data: {root} holds no class folders with images ({error})"
            ) from error
        self.classes = self.folder.classes

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.folder[index]


def read_image(path: str):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:  # UnidentifiedImageError is one
        raise UserError(f"--data: cannot read image {path} ({error})") from error


def open_data(args) -> tuple[Dataset, Dataset, int]:
    """Training set, held-out set, channels."""
    if args.data is None:
        try:
            return (
                *(
                    DigitCanvases(train, args.img_size, args.limit, seed=args.seed)
                    for train in (True, False)
                ),
                1,
            )
        except ValueError as error:
            raise UserError(f"--img-size: {error}") from error
    root = Path(args.data)
    if not root.is_dir():
        raise UserError(f"--data: no such folder: {root}")
    if (root / "train").is_dir() and (root / "val").is_dir():
        train, val = (
            ImageFolderSplit(root / part, args.img_size, part == "train")
            for part in ("train", "val")
        )
        if train.classes != val.classes:
            raise UserError(
                f"--data: train and val hold other classes: {train.classes} and {val.classes}"
            )
        return train, val, 3
    train, val = (ImageFolderSplit(root, args.img_size, part) for part in (True, False))
    order = np.random.default_rng(args.seed).permutation(len(train))
    held_out = max(1, len(order) // 5)
    if len(order) < 2:
        raise UserError(f"--data: expected at least 2 images in {root}, found {len(order)}")
    parts = Subset(train, order[held_out:].tolist()), Subset(val, order[:held_out].tolist())
    for part in parts:
        part.classes = train.classes
    return *parts, 3


def create_model(args, in_chans: int, num_classes: int) -> torch.nn.Module:
    if not timm.is_model(args.model.split(".")[0]):
        raise UserError(
            f"--model: timm knows no model {args.model!r}; try timm.list_models('*colt5*')"
        )
    common = {"in_chans": in_chans, "num_classes": num_classes, "pretrained": args.pretrained}
    try:
        return timm.create_model(args.model, img_size=args.img_size, **common)
    except TypeError:  # a convolutional network takes any size and no img_size
        return timm.create_model(args.model, **common)
    except (RuntimeError, OSError) as error:
        if not args.pretrained:
            raise
        raise UserError(
            f"--pretrained: no weights for {args.model} ({first_line(error)})"
        ) from error


def optimizer_for(model: torch.nn.Module, args) -> torch.optim.Optimizer:
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name in skip]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or name in skip)]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr)


class Progress:
    """What a checkpoint holds besides weights and optimizer: finished epochs and their figures."""

    def __init__(self):
        self.history: list[dict] = []

    def state_dict(self) -> dict:
        return {"history": self.history}

    def load_state_dict(self, state: dict) -> None:
        self.history = state["history"]


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Write beside the old checkpoint, then swap: an interruption leaves one of the two whole."""
    fresh, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    old = folder.with_name("checkpoint.old")  # interrupted between the two renames
    folder = folder if folder.exists() else old
    if not folder.exists():
        raise UserError(f"--resume: no checkpoint in {folder.parent}")
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # safetensors, pickle and shape errors are many types
        raise UserError(f"--resume: cannot load {folder} ({first_line(error)})") from error


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to 1/100."""
    warm = max(1, total // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (
        0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    )


@torch.no_grad()
def evaluate(accelerator: Accelerator, model, loader) -> float:
    model.eval()
    right = seen = 0
    for images, labels in loader:
        guess, labels = accelerator.gather_for_metrics((model(images).argmax(1), labels))
        right, seen = right + (guess == labels).sum().item(), seen + len(labels)
    return right / seen


def train(args) -> None:
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        raise UserError(f"--device: {args.device} is not available here")
    try:
        # processes that share no accelerator find each other only if told that they have none
        cpu = args.device == "cpu" or not torch.accelerator.is_available()
        accelerator = Accelerator(mixed_precision=args.amp, cpu=cpu)
    except ValueError as error:  # a precision that the device does not have
        raise UserError(f"--amp: {error}") from error
    set_seed(args.seed)
    train_set, val_set, channels = open_data(args)
    output = Path(args.output)
    loaders = {"batch_size": args.batch_size, "num_workers": args.workers}
    order = torch.Generator()
    train_loader = DataLoader(
        train_set,
        shuffle=True,
        generator=order,
        drop_last=len(train_set) >= args.batch_size,
        **loaders,
    )
    val_loader = DataLoader(val_set, **loaders)
    model = create_model(args, channels, len(train_set.classes))
    optimizer, progress = optimizer_for(model, args), Progress()
    model, optimizer, train_loader, val_loader = accelerator.prepare(
        model, optimizer, train_loader, val_loader
    )
    accelerator.register_for_checkpointing(progress)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    if args.resume:
        load_checkpoint(accelerator, output / "checkpoint")
        accelerator.print(f"resuming after epoch {len(progress.history)} of {args.epochs}")

    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    total = args.epochs * len(train_loader)
    for epoch in range(len(progress.history), args.epochs):
        train_loader.set_epoch(epoch)  # and with it the data set's
        # the order of an epoch depends on its number alone, so a resumed run sees what an unbroken
        # one would
        set_seed(args.seed * 1000 + epoch)
        order.manual_seed(args.seed * 1000 + epoch)
        model.train()
        start, losses = time.perf_counter(), []
        bar = tqdm(
            train_loader,
            desc=f"epoch {epoch + 1}/{args.epochs}",
            disable=not accelerator.is_main_process,
        )
        for step, (images, labels) in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * len(train_loader) + step, total, args.lr)
            loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if step % 10 == 0:
                bar.set_postfix(loss=f"{torch.stack(losses[-50:]).mean().item():.3f}")
        accuracy = evaluate(accelerator, model, val_loader)
        seconds = time.perf_counter() - start
        mean_loss = torch.stack(losses).mean().item()
        progress.history.append(
            {"epoch": epoch + 1, "loss": mean_loss, "accuracy": accuracy, "seconds": seconds}
        )
        accelerator.print(
            f"epoch {epoch + 1}: loss {mean_loss:.3f}, held-out accuracy {accuracy:.3f}, "
            f"{seconds:.0f} s"
        )
        save_checkpoint(accelerator, output / "checkpoint")
    if accelerator.is_main_process:
        report(args, output, progress.history, accelerator.unwrap_model(model), val_set)
    accelerator.wait_for_everyone()


def report(
    args, output: Path, history: list[dict], model: torch.nn.Module, val_set: Dataset
) -> None:
    """history.json, results.md, curve.png, and routing.png for a model with routed layers."""
    from matplotlib.figure import Figure

    (output / "history.json").write_text(json.dumps(history, indent=1))
    rows = [
        f"| {h['epoch']} | {h['loss']:.3f} | {h['accuracy']:.3f} | {h['seconds']:.0f} |"
        for h in history
    ]
    table = ["| epoch | training loss | held-out accuracy | seconds |", "|---|---|---|---|", *rows]
    (output / "results.md").write_text(f"# {args.model}\n\n" + "\n".join(table) + "\n")

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    epochs = [h["epoch"] for h in history]
    axis.plot(
        epochs,
        [h["accuracy"] for h in history],
        "o-",
        color="tab:orange",
        label="held-out accuracy",
    )
    axis.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1), title=args.model)
    loss_axis = axis.twinx()
    loss_axis.plot(
        epochs, [h["loss"] for h in history], "s--", color="tab:blue", label="training loss"
    )
    loss_axis.set_ylabel("loss")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(output / "curve.png", dpi=110)

    shown = [val_set[i] for i in range(min(4, len(val_set)))]
    images = torch.stack([image for image, _ in shown])
    device = next(model.parameters()).device
    model.eval()
    written = "curve.png"
    try:
        with record_routing(model) as records, torch.no_grad():
            guesses = model(images.to(device)).argmax(1).tolist()
    except ValueError:
        print("no routing.png: the model has no routed layer")
    else:
        titles = [
            f"is {val_set.classes[y]}, seen as {val_set.classes[g]}"
            for (_, y), g in zip(shown, guesses)
        ]
        plot_routing(images, records, output / "routing.png", titles=titles)
        written = "curve.png, routing.png"
    print(f"held-out accuracy {history[-1]['accuracy']:.3f} after {len(history)} epochs")
    print(f"wrote {output}/: checkpoint, history.json, results.md, {written}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="a folder of images, one sub-folder a class (or train/ and val/ of such)"
    )
    parser.add_argument("--model", default="colt5_vit_nano_patch8_192", help="any timm model")
    parser.add_argument(
        "--pretrained", action="store_true", help="start from timm's weights (needs the hub)"
    )
    parser.add_argument("--img-size", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--limit", type=int, help="use only so many digits of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/digits")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --output"
    )
    args = parser.parse_args(argv)
    at_least_one(parser, args, "img_size", "epochs", "batch_size", "limit")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(train, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
