"""Wide residual net with hard-concrete gates on the channels between the two convolutions of each block.

WRN-28-10 as Louizos, Welling & Kingma (ICLR 2018, section 4.2) gate it: Nesterov SGD, learning rate .1
falling by 5 at .3, .6 and .8 of the run, weight decay 5e-4, droprate_init .3, lambda / N = .001 / N for each
weight.

    python examples/train_wrn.py --steps 20 --depth 10 --width 2   # random images: does it run, and how fast
    python examples/train_wrn.py --data DIR                        # CIFAR-10 from its python pickles

Two orders. By default conv -> norm -> ReLU -> z * conv: the gate multiplies the inputs of the second
convolution, the first one computes what it leaves open, and the norm between sees the open channels only.
--gate-before-norm is the paper's: z * conv -> norm -> ReLU -> conv. There the norm divides the gates away,
and they get next to no gradient from the data: only the penalty moves them.

Beside every --compare-th step the same step of the same net dense is timed. At the end the open part of the
net is exported to plain torch, compared with the gated net, and with --out saved.
"""

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import data
import torch
import torch.nn.functional as F
import trainer
from report import write_whole
from torch import Tensor
from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential

from l0kernels import nn

STEM = 16
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FALLS, FACTOR = (0.3, 0.6, 0.8), 0.2
SHOWN = 20  # lines of the table


def block(
    n_in: int, n_out: int, stride: int, order: str, options: dict[str, Any]
) -> Sequence[torch.nn.Module]:
    """The modules of one block; order "dense", "after norm" or "before norm" says where its gates are."""
    norm = BatchNorm2d if order == "dense" else nn.L0BatchNorm2d
    first: torch.nn.Module = Conv2d(n_in, n_out, 3, stride, 1, bias=False)
    second: torch.nn.Module = Conv2d(n_out, n_out, 3, 1, 1, bias=False)
    if order == "before norm":
        first = nn.L0Conv2d(n_in, n_out, 3, stride, 1, bias=False, gate="out", **options)
    elif order == "after norm":
        second = nn.L0Conv2d(n_out, n_out, 3, 1, 1, bias=False, gate="in", **options)
    inner = [first, norm(n_out), ReLU(), second]
    if n_in == n_out and stride == 1:
        return [nn.L0Residual(Sequential(norm(n_in), ReLU(), *inner))]
    return [
        norm(n_in),
        ReLU(),
        nn.L0Residual(Sequential(*inner), Conv2d(n_in, n_out, 1, stride, bias=False)),
    ]


def wide_residual_net(depth: int, width: int, order: str, **options: Any) -> nn.L0Sequential:
    """WRN-depth-width for 3x32x32 images; `options` are those of the gates."""
    modules: list[torch.nn.Module] = [Conv2d(3, STEM, 3, 1, 1, bias=False)]
    n_in = STEM
    with warnings.catch_warnings():  # the order of the paper was asked for
        warnings.simplefilter("ignore", UserWarning)
        for group in range(3):
            n_out = STEM * width * 2**group
            for i in range((depth - 4) // 6):
                modules += block(n_in, n_out, 2 if group and not i else 1, order, options)
                n_in = n_out
        norm = BatchNorm2d if order == "dense" else nn.L0BatchNorm2d
        tail = [norm(n_in), ReLU(), AdaptiveAvgPool2d(1), Flatten(), Linear(n_in, data.CLASSES)]
        net = nn.L0Sequential(*modules, *tail)
    for module in net.modules():
        if isinstance(module, Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return net


class Learner:
    """A net and its optimiser; the weights decay, the gates do not."""

    def __init__(self, net: torch.nn.Module, lr: float, gates_lr: float, weight_decay: float) -> None:
        self.net = net
        self.gated = bool(nn.gate_modules(net))
        groups: list[dict[str, Any]] = [{"params": nn.weight_parameters(net), "weight_decay": weight_decay}]
        if self.gated:
            groups.append({"params": nn.gate_parameters(net), "lr": gates_lr, "weight_decay": 0.0})
        self.optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
        if self.gated:
            nn.clamp_after_step(self.optimizer, net)
        self._full = [group["lr"] for group in self.optimizer.param_groups]

    def set_progress(self, share: float) -> None:
        """The learning rates after this share of the run."""
        for group, lr in zip(self.optimizer.param_groups, self._full, strict=True):
            group["lr"] = lr * FACTOR ** sum(share >= fall for fall in FALLS)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """The loss, and the milliseconds that the step took."""
        begin = _now(x)
        loss = F.cross_entropy(self.net(x), y)
        if self.gated:
            loss = loss + nn.penalty(self.net)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), 1e3 * (_now(x) - begin)


def _now(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


class Images:
    """Batches of CIFAR-10, shifted and mirrored, or of random images whose means tell their classes."""

    def __init__(self, folder: Path | None, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.cifar = None if folder is None else data.cifar10(folder)
        self.examples = 50_000 if self.cifar is None else len(self.cifar.train_y)
        if batch_size > self.examples:
            raise ValueError(f"--batch-size: expected at most {self.examples}, got {batch_size}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Without end."""
        while True:
            if self.cifar is None:
                y = torch.randint(data.CLASSES, (self.batch_size,))
                x = torch.randn(self.batch_size, 3, 32, 32) + 0.2 * (y.view(-1, 1, 1, 1) - 4.5)
                yield x.to(self.device), y.to(self.device)
                continue
            for index in torch.randperm(self.examples)[: -(self.examples % self.batch_size) or None].split(
                self.batch_size
            ):
                x = self._normal(self.cifar.train_x[index])
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
                top, left = torch.randint(9, (2,)).tolist()  # one shift a batch
                x = F.pad(x, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]
                yield x, self.cifar.train_y[index].to(self.device)

    def test_error(self, net: torch.nn.Module) -> float | None:
        """Share of the test set that is classified wrongly; None without data."""
        if self.cifar is None:
            return None
        net.eval()
        wrong = 0
        for x, y in zip(self.cifar.test_x.split(500), self.cifar.test_y.split(500), strict=True):
            wrong += int((trainer.predict(net, self._normal(x)).argmax(1).cpu() != y).sum())
        net.train()
        return wrong / len(self.cifar.test_y)

    def _normal(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(c, device=self.device).view(3, 1, 1) for c in (MEAN, STD))
        return (x.to(self.device).view(-1, 3, 32, 32) - mean) / std


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a wide residual net with hard-concrete gates.")
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of CIFAR-10's pickles; default: random images")
    add("--depth", type=trainer.whole(10), default=28, help="6 n + 4, default %(default)s")
    add("--width", type=trainer.whole(1), default=10, help="default %(default)s")
    add("--gate-before-norm", action="store_true", help="the paper's order")
    add("--epochs", type=trainer.whole(1), default=200, help="default %(default)s")
    add("--steps", type=trainer.whole(1), help="stop after so many instead")
    add("--batch-size", type=trainer.whole(1), default=128, help="default %(default)s")
    add("--lr", type=trainer.positive, default=0.1, help="default %(default)s")
    add("--gates-lr", type=trainer.positive, help="default: that of the weights; others took 60 times it")
    add("--lambda", dest="lam", type=trainer.positive, default=0.001, help="to be divided by N")
    add("--droprate", type=trainer.positive, default=0.3, help="droprate_init, default %(default)s")
    add("--compare", type=trainer.whole(0), default=10, help="time dense beside each such step; 0: never")
    add("--seed", type=trainer.whole(0), default=0, help="default %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--threads", type=trainer.whole(1), help="of torch and the kernels")
    add("--out", type=Path, metavar="FILE", help="where the exported net is saved, whole: torch.load it")
    args = parser.parse_args(argv)
    if args.depth % 6 != 4:
        parser.error(f"argument --depth: expected 6 n + 4, got {args.depth}")
    if not args.droprate < 1:
        parser.error(f"argument --droprate: expected a number below 1, got {args.droprate}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device and a torch build for it, got none")
    return args


def train(args: argparse.Namespace) -> nn.L0Sequential:
    """The trained net; prints some twenty lines on the way."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images = Images(args.data, args.batch_size, device)
    steps = args.steps or args.epochs * (images.examples // args.batch_size)
    order = "before norm" if args.gate_before_norm else "after norm"
    options = {"droprate_init": args.droprate, "lam": args.lam / images.examples}
    net = wide_residual_net(args.depth, args.width, order, **options)
    rates = args.lr, args.gates_lr or args.lr, 5e-4
    gated = Learner(net.to(device), *rates)
    dense = Learner(wide_residual_net(args.depth, args.width, "dense").to(device), *rates)
    shape = (1, 3, 32, 32)
    flops = nn.eval_flops(dense.net, shape)
    channels = sum(gate.n for gate in nn.gate_modules(net))
    print(f"WRN-{args.depth}-{args.width}, gates {order}, {steps} steps of {args.batch_size} images")
    print("  step      loss  test error  open channels  E[FLOPs]   step ms  dense ms  vs dense")
    times: list[float] = []
    dense_times: list[float] = []
    every, epoch = -(-steps // SHOWN), images.examples // args.batch_size
    error: float | None = None
    for step, (x, y) in zip(range(1, steps + 1), images.batches(), strict=False):
        gated.set_progress((step - 1) / steps)
        loss, ms = gated.step(x, y)
        times.append(ms)
        if args.compare and step % args.compare == 1 % args.compare:
            dense_times.append(dense.step(x, y)[1])
        if step % epoch == 0 or step == steps:
            error = images.test_error(net)
        if step in (1, steps) or step % every == 0:
            ours = median(times)
            ratio = f"{median(dense_times):9.1f}  {ours / median(dense_times):7.2f}x" if dense_times else ""
            print(
                f"{step:6}  {loss:8.4f}  {'-' if error is None else f'{error:.2%}':>10}  "
                f"{sum(units.open for units in nn.open_units(net).values()):6} of {channels:4}  "
                f"{nn.expected_flops(net, shape).item() / flops:8.1%}  {ours:8.1f} {ratio}",
                flush=True,
            )
            times.clear()
            dense_times[:-1] = []
    return net


def export(net: nn.L0Sequential, x: Tensor) -> torch.nn.Module:
    """The open part of the net in plain torch, once its outputs for x are proven those of the gated net.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    small = nn.export(net.eval())
    with trainer.without_tf32():
        wanted, got = trainer.predict(net, x), trainer.predict(small, x)
    difference, scale = (got - wanted).abs().max().item(), max(1.0, wanted.abs().max().item())
    if not difference <= 1e-4 * scale:
        tolerance = f"{1e-4 * scale:.1e}"
        raise RuntimeError(f"expected the gated net's outputs within {tolerance}, got {difference:.1e}")
    kept, of = (sum(p.numel() for p in part) for part in (small.parameters(), nn.weight_parameters(net)))
    print(f"exported net  {kept:,} of {of:,} parameters, outputs within {difference:.1e} of the gated net's")
    return small


def main(argv: Sequence[str] | None = None) -> torch.nn.Module:
    """Returns the exported net."""
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with trainer.denormals_flushed():
        net = train(args)
    small = export(net, next(Images(args.data, 16, torch.device(args.device)).batches())[0])
    if args.out is not None:
        write_whole(args.out, lambda temporary: torch.save(small.cpu(), temporary))
        print(f"written to    {args.out}")
    return small


if __name__ == "__main__":
    trainer.run_script(main)
