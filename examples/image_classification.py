"""Train an image classifier with routed attention on real images, and see where its heavy branch
looks.

    python examples/image_classification.py                       # digits in 192x192 canvases
    python examples/image_classification.py --resume              # go on after an interruption
    python examples/image_classification.py --data FOLDER         # your images, a folder a class
    torchrun --nproc-per-node 2 examples/image_classification.py  # two processes

Costs: the digits take five minutes on two CPU cores, and no download.

Leaves in --output: checkpoint/ (safetensors), settings.json (model, size, names of the classes),
history.json, results.md (with a table of what was taken for what), curve.png, validation.png
(held-out images, errors first), routing.png. An older run there is moved to --output/before.
"""

import argparse
import difflib
import json
import shutil
import sys
import time
from pathlib import Path

import timm
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import colt5_vision.models  # noqa: F401  (registers colt5_* with timm)
from colt5_vision import ConditionalRoutedImageAttention
from support.checkpoints import cannot_write, refuse_others
from support.classes_report import draw_curve, draw_pictures, write_tables
from support.command_line import (
    Help,
    UserError,
    above_zero,
    at_least,
    cause,
    exit_status,
    learning_rate,
    make_folder,
    set_aside,
    stop_request,
)
from support.digits import DigitCanvases
from support.folders import open_folder

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LEAVES = ("checkpoint", "settings.json", "history.json", "results.md")
LEAVES += ("curve.png", "validation.png", "routing.png")
SAME = ("model", "img_size", "data", "batch_size", "limit", "seed")  # of a resumed run


def check_model(name: str) -> None:
    """End with a message if timm has no such model, or no such weights of it."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        near = near or ["timm.list_models('*colt5*')"]
        raise UserError(f"--model: timm knows no model {name!r}; try {', '.join(near)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"--model: cannot make {name} ({cause(error)})") from error


def normalisation(args) -> dict:
    """Mean and deviation of each channel that a model wants: its own if its weights are loaded."""
    told = timm.get_pretrained_cfg(args.model) if args.pretrained else None
    return IMAGENET if told is None else {"mean": told.mean, "std": told.std}


def open_data(args) -> tuple[Dataset, Dataset, int]:
    """Training set, held-out set, channels."""
    if args.data is not None:
        how = {"seed": args.seed, "limit": args.limit, "skip_broken": args.skip_broken}
        parts = open_folder(Path(args.data), args.img_size, **normalisation(args), **how)
        return *parts, 3
    try:
        train, val = (
            DigitCanvases(train, args.img_size, args.limit, seed=args.seed)
            for train in (True, False)
        )
    except ValueError as error:
        raise UserError(f"--img-size: {error}") from error
    return train, val, 1


def create_model(args, in_chans: int, num_classes: int) -> tuple[torch.nn.Module, dict]:
    """A model, and the options that make one of its shape."""
    sized = {"img_size": args.img_size, "in_chans": in_chans, "num_classes": num_classes}
    free = {"in_chans": in_chans, "num_classes": num_classes}
    try:
        try:
            return timm.create_model(args.model, pretrained=args.pretrained, **sized), sized
        except TypeError:  # a convolutional network takes any size and no img_size
            return timm.create_model(args.model, pretrained=args.pretrained, **free), free
    except (RuntimeError, OSError) as error:
        option = "pretrained" if args.pretrained else "model"
        raise UserError(f"--{option}: cannot make {args.model} ({cause(error)})") from error


def tokens_and_keys(model: torch.nn.Module, size: int) -> str:
    """Tokens of the first map that has routed attention, and how many of them are routed keys."""
    layers = [m for m in model.modules() if isinstance(m, ConditionalRoutedImageAttention)]
    stages = getattr(model, "feature_info", None)
    if not layers or not stages:
        return ""
    tokens, keys = (size // stages[0]["reduction"]) ** 2, layers[0].num_heavy_tokens_kv
    keys = keys if isinstance(keys, int) else int(keys * tokens + 0.5)
    return f"; {tokens:,} tokens an image, {min(keys, tokens):,} of them routed keys"


def optimizer_for(model: torch.nn.Module, args) -> torch.optim.Optimizer:
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name in skip]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or name in skip)]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr)


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Write beside the old checkpoint, then swap: an interruption leaves one of the two whole."""
    fresh, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(fresh), safe_serialization=True)
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise cannot_write(folder.parent, error) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, settings: dict) -> None:
    """Weights, optimizer and progress of a run with the same settings."""
    old = folder.with_name("checkpoint.old")  # interrupted between the two renames
    folder = folder if folder.exists() else old
    if not folder.exists():
        raise UserError(f"--resume: no checkpoint in {folder.parent}")
    told = folder.with_name("settings.json")
    saved = json.loads(told.read_text()) if told.exists() else {}
    refuse_others(saved, {name: settings[name] for name in SAME})
    if saved.get("classes", settings["classes"]) != settings["classes"]:
        raise UserError(
            f"--data: the run to resume had the classes {saved['classes']}, now there are "
            f"{settings['classes']}"
        )
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # safetensors, pickle and shape errors are many types
        raise UserError(f"--resume: cannot load {folder} ({cause(error)})") from error


class Run:
    """A training in progress.

    Attributes:
        history: figures of the finished epochs.
        losses: of the steps of the epoch in progress, the mean over processes.
        taken: (classes, classes) counts of held-out images, what they are by what they were taken
            for.
    """

    def __init__(self, args, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.output = Path(args.output)
        check_model(args.model)
        train_set, self.held_out, channels = open_data(args)
        self.classes = train_set.classes
        loaders = {"batch_size": args.batch_size, "num_workers": args.workers}

        # a batch of one image would have no variance; every other rest is trained on
        single = len(train_set) % args.batch_size == 1 and len(train_set) > args.batch_size
        self.order = torch.Generator()
        shuffled = {"shuffle": True, "generator": self.order, "drop_last": single}
        train_loader = DataLoader(train_set, **shuffled, **loaders)
        model, self.made = create_model(args, channels, len(self.classes))
        self.model, self.optimizer, self.loader, self.val_loader = accelerator.prepare(
            model, optimizer_for(model, args), train_loader, DataLoader(self.held_out, **loaders)
        )
        self.history: list[dict] = []
        self.losses: list[float] = []
        accelerator.register_for_checkpointing(self)

        # what there is, in a line
        names = ", ".join(map(str, self.classes[:10])) + (", ..." if len(self.classes) > 10 else "")
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        accelerator.print(
            f"{len(train_set)} images to train, {len(self.held_out)} held out, "
            f"{len(self.classes)} classes ({names}); {args.model}, {parameters:.2f} M parameters, "
            f"on {accelerator.device}; {len(self.loader)} steps an epoch"
            f"{tokens_and_keys(model, args.img_size)}"
        )

    def state_dict(self) -> dict:
        return {"history": self.history, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.history, self.losses = state["history"], state.get("losses", [])

    def settings(self) -> dict:
        """What another program needs to use the weights, and a resumed run to compare."""
        told = {name: getattr(self.args, name) for name in SAME}
        return told | {"classes": list(self.classes), **normalisation(self.args)}

    def save(self) -> None:
        save_checkpoint(self.accelerator, self.output / "checkpoint")

    def step(self, images: Tensor, labels: Tensor, stop: bool) -> bool:
        """One optimizer step; whether any process was asked to stop."""
        epoch, step = len(self.history), len(self.losses)
        total, now = self.args.epochs * len(self.loader), epoch * len(self.loader) + step
        torch.manual_seed(hash((self.args.seed, epoch, step, self.accelerator.process_index)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(now, total, self.args.lr, floor=0.01)
        loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
        loss = loss_of(self.model(images), labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        told = torch.stack([loss.detach().float(), loss.new_tensor(float(stop), dtype=torch.float)])
        mean, stops = self.accelerator.reduce(told, "mean").tolist()
        self.losses.append(mean)
        return stops > 0

    def epoch(self, stop) -> None:
        """Train the epoch in progress to its end, and judge; saves when asked to stop."""
        epoch, done = len(self.history), len(self.losses)

        # the order of an epoch depends on its number alone, so a resumed run sees what an unbroken
        # one would
        set_seed(self.args.seed * 1000 + epoch)
        self.order.manual_seed(self.args.seed * 1000 + epoch)
        loader = skip_first_batches(self.loader, done) if done else self.loader
        loader.set_epoch(epoch)  # and with it the data set's
        self.model.train()

        # train
        start, shown = time.perf_counter(), self.accelerator.is_main_process
        desc = f"epoch {epoch + 1}/{self.args.epochs}"
        bar = tqdm(loader, desc, len(self.loader), initial=done, disable=not shown)
        for images, labels in bar:
            stopped = self.step(images, labels, stop.is_set())
            recent = self.losses[-50:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
            if stopped:
                self.save()
                raise KeyboardInterrupt

        # judge
        accuracy, seconds = self.judge(), time.perf_counter() - start
        loss = sum(self.losses) / len(self.losses)
        figures = {"epoch": epoch + 1, "loss": loss, "accuracy": accuracy, "seconds": seconds}
        self.history.append(figures)
        self.losses = []
        self.accelerator.print(
            f"epoch {epoch + 1}: loss {loss:.3f}, held-out accuracy {accuracy:.3f}, {seconds:.0f} s"
        )
        self.save()

    @torch.no_grad()
    def judge(self) -> float:
        """Share of the held-out images that are seen as what they are."""
        self.model.eval()
        count = len(self.classes)
        self.taken = torch.zeros(count * count, dtype=torch.long)
        for images, labels in self.val_loader:
            pair = (labels, self.model(images).argmax(1))
            is_, seen_as = self.accelerator.gather_for_metrics(pair)
            self.taken += torch.bincount((is_ * count + seen_as).cpu(), minlength=count * count)
        self.taken = self.taken.view(count, count)
        return (self.taken.diagonal().sum() / self.taken.sum()).item()

    def report(self) -> None:
        """Tables and pictures, and how to use the weights."""
        args, output = self.args, self.output
        confusion = write_tables(output, args.model, self.classes, self.history, self.taken)
        draw_curve(output / "curve.png", args.model, self.classes, self.history)
        model = self.accelerator.unwrap_model(self.model)
        pictures = draw_pictures(output, model, self.held_out)
        if confusion:
            print("held-out images, what they are by what they were seen as:", *confusion, sep="\n")
        accuracy, epochs = self.history[-1]["accuracy"], len(self.history)
        print(f"held-out accuracy {accuracy:.3f} after {epochs} epochs")
        print(
            f"wrote {output}/: checkpoint, settings.json, history.json, results.md, curve.png, "
            f"{', '.join(pictures)}"
        )
        weights = str(output / "checkpoint" / "model.safetensors")
        options = "".join(f"{name}={value!r}, " for name, value in self.made.items())
        print(f"load it: timm.create_model({args.model!r}, {options}checkpoint_path={weights!r})")


def train(args) -> None:
    # where
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        raise UserError(f"--device: {args.device} is not available here")
    try:
        # processes that share no accelerator find each other only if told that they have none
        cpu = args.device == "cpu" or not torch.accelerator.is_available()
        accelerator = Accelerator(mixed_precision=args.amp, cpu=cpu)
    except ValueError as error:  # a precision that the device does not have
        raise UserError(f"--amp: {error}") from error
    set_seed(args.seed)

    # start, or go on
    output, main = Path(args.output), accelerator.is_main_process
    if main:
        make_folder(output)
    run = Run(args, accelerator)
    if args.resume:
        load_checkpoint(accelerator, output / "checkpoint", run.settings())
        part = f" and {len(run.losses)} steps" if run.losses else ""
        accelerator.print(f"resuming after epoch {len(run.history)}{part} of {args.epochs}")
    elif main:
        set_aside(output, *LEAVES)
    if main:
        (output / "settings.json").write_text(json.dumps(run.settings(), indent=1) + "\n")
    accelerator.wait_for_everyone()

    # train
    with stop_request() as stop:
        if len(run.history) >= args.epochs:  # resumed when all was done
            run.judge()
        while len(run.history) < args.epochs:
            run.epoch(stop)
    if main:
        run.report()
    accelerator.wait_for_everyone()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument

    # the data and the model
    add("--data", help="a folder of images, one sub-folder a class (or train/ and val/ of such)")
    add("--skip-broken", action="store_true", help="read all files first, leave out broken ones")
    add("--model", default="colt5_vit_nano_patch8_192", help="any timm model")
    add("--pretrained", action="store_true", help="start from timm's weights (needs the hub)")
    add("--img-size", type=int, default=192, help="side in pixels")

    # training
    add("--epochs", type=int, default=7, help="in all, those of a resumed run too")
    add("--batch-size", type=int, default=16, help="of each process")
    add("--lr", type=above_zero, help="highest learning rate; 4e-3, with --pretrained 4e-4")
    add("--weight-decay", type=float, default=0.02, help="of AdamW")

    # the run
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--amp", choices=("no", "bf16", "fp16"), default="no", help="half precision")
    add("--workers", type=int, default=0, help="data loading processes")
    add("--limit", type=int, help="use only so many images of each split")
    add("--seed", type=int, default=0, help="of weights, order and split")
    add("--output", help="folder; runs/digits, or runs/NAME of --data")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")

    # checks
    args = parser.parse_args(argv)
    at_least(parser, args, 1, "img_size", "epochs", "batch_size", "limit")
    at_least(parser, args, 0, "weight_decay", "workers", "seed")

    # what hangs on other options
    args.lr = args.lr or (4e-4 if args.pretrained else 4e-3)
    name = "digits" if args.data is None else Path(args.data).resolve().name
    args.output = args.output or f"runs/{name}"
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(train, parse(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
