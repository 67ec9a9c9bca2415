"""Train a small diffusers UNet with routed attention to draw real digits, from scratch.

    python examples/train_diffusion.py                       # 64 x 64 digits
    python examples/train_diffusion.py --resume              # go on after an interruption
    torchrun --nproc-per-node 2 examples/train_diffusion.py  # two processes

Costs: some minutes on two CPU cores, and no download.

Leaves in --output: checkpoint.pt, metrics.jsonl, results.md, curve.png, samples/epoch_001.png, ...
An older run there is moved to --output/before.

DDPM given the digit, in the form that predicts sqrt(1 - s²) noise - s image ("velocity"); with the
noise as the target the first epoch drew noise. Samples by DDIM with classifier-free guidance from
averaged weights (EMA).
"""

import argparse
import json
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss, pixel_shuffle, pixel_unshuffle
from tqdm.auto import tqdm

from colt5_vision.checks import token_count
from colt5_vision.pipelines import build_routed_attention
from support.checkpoints import load_checkpoint, save_checkpoint
from support.command_line import (
    Help,
    UserError,
    above_zero,
    at_least,
    count_or_share,
    exit_status,
    learning_rate,
    make_folder,
    set_aside,
    stop_request,
)
from support.digits import draw_digits, load_digits

FOLD = 2  # the UNet sees blocks of 2 x 2 pixels as 4 channels: a quarter of the positions
NO_CLASS, DROP, GUIDANCE = (
    10,
    0.1,
    1.5,
)  # classifier-free guidance: training hides a tenth of the labels
RANGE = (
    0.5  # images lie in [-0.5, 0.5]: noisier at every timestep, for larger maps (arXiv 2301.10972)
)
DDIM_STEPS, ROWS, HELD_OUT = 20, 4, 200
PARTS = ("unet", "optimizer", "ema")  # of a checkpoint
LEAVES = ("checkpoint.pt", "metrics.jsonl", "results.md", "curve.png", "samples")
SAME = (
    "size",
    "batch_size",
    "limit",
    "keys",
    "window",
    "fusion",
    "seed",
)  # what a resumed run may not change


def digits(
    size: int, limit: int | None, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and held-out digits (N, 4, size / 2, size / 2) in [-RANGE, RANGE] and their
    labels."""
    images, labels = load_digits()
    order = np.random.default_rng(seed).permutation(len(images))
    side, low = size * 7 // 8, size // 16

    def part(index):
        x = torch.from_numpy(images[index]).unsqueeze(1).float() / 127.5 - 1
        x = interpolate(x, side, mode="bicubic", antialias=True).clamp(-1, 1)
        x = torch.nn.functional.pad(x, (low, size - side - low) * 2, value=-1.0)
        return pixel_unshuffle(RANGE * x, FOLD), torch.from_numpy(labels[index])

    return part(order[:-HELD_OUT][:limit]), part(order[-HELD_OUT:][:limit])


def make_unet(args, routed: bool = True) -> UNet2DModel:
    """Attention on the maps of size / 2, size / 4 and size / 8, routed or full."""
    unet = UNet2DModel(
        sample_size=args.size // FOLD,
        in_channels=FOLD**2,
        out_channels=FOLD**2,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=NO_CLASS + 1,
    )
    if routed:
        options = {"light_window_size": args.window, "fusion": args.fusion, "rotary_emb": True}
        build_routed_attention(unet, num_heavy_tokens_kv=args.keys, **options)
    return unet


class Run:
    """Model, optimizer and averaged weights, and how far they are.

    Attributes:
        losses: of every step so far, the mean over processes; their number is the step.
        history: figures of the finished epochs.
    """

    def __init__(self, args, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        (self.images, self.labels), self.held_out = digits(args.size, args.limit, args.seed)
        batch = args.batch_size * self.processes
        self.steps = len(self.images) // batch
        if not self.steps:
            raise UserError(
                f"--limit: expected {batch} digits, a batch for each process, got "
                f"{len(self.images)}"
            )
        unet = make_unet(args)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.unet = accelerator.unwrap_model(self.model)
        self.ema = EMAModel(self.unet.parameters(), decay=0.995, use_ema_warmup=True, power=3 / 4)
        schedule = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
        self.noising = DDPMScheduler(**schedule, clip_sample_range=RANGE)
        self.losses: list[float] = []
        self.history: list[dict] = []

    def settings(self) -> dict:
        return {name: getattr(self.args, name) for name in SAME} | {"num_processes": self.processes}

    def save(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            state = {name: getattr(self, name).state_dict() for name in PARTS}
            state |= {"losses": self.losses, "history": self.history}
            save_checkpoint(path, state | {"settings": self.settings()})
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        def parts(state: dict) -> None:
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])

        state = load_checkpoint(path, self.settings(), parts)
        self.losses, self.history = state["losses"], state["history"]
        self.ema.to(self.accelerator.device)

    def loss(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, drop: float
    ) -> Tensor:
        """Mean squared error of the velocity predicted for noisy images (B, 4, H, W)."""
        noise = torch.randn(images.shape, generator=generator)
        t = torch.randint(
            0, self.noising.config.num_train_timesteps, (len(images),), generator=generator
        )
        labels = labels.masked_fill(torch.rand(len(labels), generator=generator) < drop, NO_CLASS)
        noisy, velocity = (
            self.noising.add_noise(images, noise, t),
            self.noising.get_velocity(images, noise, t),
        )
        noisy, t, labels, velocity = (
            x.to(self.accelerator.device) for x in (noisy, t, labels, velocity)
        )
        return mse_loss(self.model(noisy, t, class_labels=labels).sample.float(), velocity)

    def step(self, epoch: int, step: int, stop: bool) -> bool:
        """One optimizer step, a function of (seed, epoch, step, rank); whether any process was
        asked to stop."""
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.images))
        start = (step * self.processes + self.rank) * self.args.batch_size
        index = torch.from_numpy(order[start : start + self.args.batch_size])
        seed = np.random.default_rng((self.args.seed, epoch, step, self.rank)).integers(2**62)
        draws = torch.Generator().manual_seed(int(seed))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                len(self.losses), self.args.epochs * self.steps, self.args.lr
            )
        loss = self.loss(self.images[index], self.labels[index], draws, DROP)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.unet.parameters())
        told = torch.stack([loss.detach().float(), torch.tensor(float(stop), device=loss.device)])
        mean, stops = self.accelerator.reduce(told, "mean").tolist()
        self.losses.append(mean)
        return stops > 0

    @torch.no_grad()
    def judge(self, path: Path) -> float:
        """Held-out loss of the averaged weights, and a picture of digits that they draw."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        model, self.model = self.model, self.unet.eval()
        loss = self.loss(*self.held_out, torch.Generator().manual_seed(0), 0.0).item()
        drawn = self.draw(torch.arange(10).repeat(ROWS))[:, 0]
        self.model = model.train()
        self.ema.restore(self.unet.parameters())
        draw_digits(path, ((drawn + 1) * 127.5).round().byte().cpu().numpy())
        return loss

    def draw(self, labels: Tensor) -> Tensor:
        """Images (B, 1, size, size) in [-1, 1] of the digits ``labels``, from the same noise every
        time."""
        device, scheduler = (
            self.accelerator.device,
            DDIMScheduler.from_config(self.noising.config, timestep_spacing="trailing"),
        )
        scheduler.set_timesteps(DDIM_STEPS)
        x = torch.randn(
            len(labels),
            *self.images.shape[1:],
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        x, labels = x.to(device), torch.cat([labels, torch.full_like(labels, NO_CLASS)]).to(device)
        for t in scheduler.timesteps:
            given, free = (
                self.unet(torch.cat([x, x]), t, class_labels=labels).sample.float().chunk(2)
            )
            x = scheduler.step(free + GUIDANCE * (given - free), t, x).prev_sample
        return pixel_shuffle(x / RANGE, FOLD).clamp(-1, 1)


def train(args) -> None:
    # where
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        raise UserError(f"--device: {args.device} is not available here")
    # without a word from us, processes that share no accelerator would not find each other
    cpu = args.device == "cpu" or not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(mixed_precision=args.amp, cpu=cpu)
    except ValueError as error:  # a precision that the device does not have
        raise UserError(f"--amp: {error}") from error

    # start, or go on
    set_seed(args.seed)
    run, output, main = Run(args, accelerator), Path(args.output), accelerator.is_main_process
    if args.resume:
        run.load(output / "checkpoint.pt")
        accelerator.print(f"resuming after step {len(run.losses)} of {args.epochs * run.steps}")
    elif main:
        make_folder(output)
        set_aside(output, *LEAVES)

    # train
    with stop_request() as stop:
        while (epoch := len(run.history)) < args.epochs:
            start, done = time.perf_counter(), len(run.losses) - epoch * run.steps
            steps, desc = range(done, run.steps), f"epoch {epoch + 1}/{args.epochs}"

            for step in (bar := tqdm(steps, desc, run.steps, initial=done, disable=not main)):
                stopped = run.step(epoch, step, stop.is_set())
                bar.set_postfix(loss=f"{np.mean(run.losses[-50:]):.3f}", refresh=False)
                if stopped:
                    run.save(output / "checkpoint.pt")
                    raise KeyboardInterrupt

            # how good it is, and how fast
            seconds = time.perf_counter() - start
            images = (run.steps - done) * args.batch_size * run.processes
            loss = float(np.mean(run.losses[epoch * run.steps :]))
            figures = {
                "epoch": epoch + 1,
                "loss": loss,
                "seconds": seconds,
                "images_per_second": images / seconds,
            }
            if main:
                figures["held_out_loss"] = run.judge(
                    output / "samples" / f"epoch_{epoch + 1:03d}.png"
                )
                print(
                    f"epoch {epoch + 1}: loss {loss:.4f}, held out "
                    f"{figures['held_out_loss']:.4f}, {seconds:.0f} s"
                )

            # what is kept and shown
            run.history.append(figures)
            run.save(output / "checkpoint.pt")
            report(run, output)

    # at the end, what routing saves
    if main:
        report(run, output, line := compare(run))
        print(
            f"{line}\nwrote {output}/: checkpoint.pt, metrics.jsonl, results.md, curve.png, "
            "samples/"
        )
    accelerator.wait_for_everyone()


def report(run: Run, output: Path, line: str = "") -> None:
    """metrics.jsonl, results.md, curve.png, of the main process."""
    if not run.accelerator.is_main_process:
        return
    (output / "metrics.jsonl").write_text("".join(json.dumps(h) + "\n" for h in run.history))

    # the table
    rows = [
        f"| {h['epoch']} | {h['loss']:.4f} | {h['held_out_loss']:.4f} | {h['seconds']:.0f} |"
        for h in run.history
    ]
    head = [
        "# Digits drawn with routed attention\n",
        "| epoch | loss | held-out loss (EMA) | seconds |",
    ]
    (output / "results.md").write_text(
        "\n".join([*head, "|---|---|---|---|", *rows, "", line]) + "\n"
    )

    # the curve
    axis = Figure(figsize=(6, 3.2), layout="constrained").subplots()
    axis.plot(
        np.arange(1, len(run.losses) + 1) / run.steps, run.losses, color="0.8", lw=0.7, label="step"
    )
    epochs = [h["epoch"] for h in run.history]
    axis.plot(epochs, [h["loss"] for h in run.history], "o-", label="epoch")
    axis.plot(
        epochs, [h["held_out_loss"] for h in run.history], "s--", label="held out, averaged weights"
    )
    axis.set(xlabel="epoch", ylabel="loss", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    axis.figure.savefig(output / "curve.png", dpi=110)


def compare(run: Run) -> str:
    """What routing saves here, and what not."""
    index, speeds, sizes = torch.arange(run.args.batch_size) % len(run.images), [], []

    def once():
        run.loss(
            run.images[index], run.labels[index], torch.Generator().manual_seed(0), DROP
        ).backward()
        next(run.model.parameters()).grad.sum().item()  # waits for the device

    for routed in (True, False):
        run.model = make_unet(run.args, routed).to(run.accelerator.device)
        sizes.append(sum(p.numel() for p in run.model.parameters()) / 1e6)
        speeds.append(len(index) / min(timeit.repeat(once, number=1, repeat=4)))
    tokens = (run.args.size // FOLD) ** 2
    keys, window = token_count("keys", run.args.keys, tokens), run.args.window
    return (
        f"Largest map, {tokens:,} tokens: each sees {keys:,} routed keys ({keys / tokens:.1%}) "
        "and its window of "
        f"{window} x {window}. {sizes[0]:.2f} M parameters, {speeds[0]:.0f} images/s forward and "
        "backward, against "
        f"{sizes[1]:.2f} M and {speeds[1]:.0f} images/s for the same UNet with full attention "
        "(not trained here)."
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument

    # the data, and training
    add("--epochs", type=int, default=6, help="in all, those of a resumed run too")
    add("--limit", type=int, help="use only so many digits")
    add("--size", type=int, default=64, help="side of the pictures, a multiple of 8")
    add("--batch-size", type=int, default=16, help="of each process")
    add("--lr", type=above_zero, default=1.5e-3, help="highest learning rate")

    # the model
    how = "routed keys: a number, or a share such as 1/8"
    add("--keys", type=count_or_share, default="1/8", help=how)
    add("--window", type=int, default=8, help="side of the light branch's windows in tokens")
    add("--fusion", choices=("sum", "softmax"), default="sum", help="how the branches are joined")

    # the run
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--amp", choices=("no", "bf16"), default="no", help="half precision")
    add("--seed", type=int, default=0, help="of weights, order and noise")
    add("--output", default="runs/diffusion", help="folder for results")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")

    # checks
    args = parser.parse_args(argv)
    at_least(parser, args, 1, "epochs", "limit", "batch_size", "window")
    at_least(parser, args, 0, "seed")
    if args.size < 32 or args.size % 8:
        parser.error(f"--size: expected a multiple of 8, at least 32, got {args.size}")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(train, parse(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
