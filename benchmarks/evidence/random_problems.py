"""Small nets with data and a loss, drawn at random from what people train: `random_problem(seed)`.

Five families take turns: perceptrons, convolutions, residual nets, attention, recurrent nets. Widths, depths,
activations, norms, dropout, initial weights, data, losses and batch sizes are drawn. No data needs the internet.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.data import digits
from benchmarks.transformer_nets import Block

CLASSES = 10
ROWS = 2048  # of the synthetic data
Loss = Callable[[Tensor, Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "tanh": nn.Tanh,
    "ELU": nn.ELU,
    "leaky ReLU": nn.LeakyReLU,
}
RECURRENT: dict[str, Callable[..., nn.Module]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
LOSSES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "MSE": F.mse_loss,
    "BCE": F.binary_cross_entropy_with_logits,
}
BATCHES = 32, 48, 64, 96, 128, 192, 256


@dataclass(frozen=True)
class Problem:
    """A net, data and a loss.

    Attributes:
        about: what it is, in words that tell it from others.
        seed: of the initial weights and of the order of the rows.
        build: makes the net.
        x: inputs, one row a sample.
        y: targets.
        loss_fn: maps outputs and targets to the loss, a mean over rows.
        batch: rows in a batch; an incomplete last batch of an epoch is left out.
    """

    about: str
    seed: int
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss_fn: Loss
    batch: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.x) // self.batch

    def make(self) -> nn.Module:
        """The net with its initial weights, the same at each call."""
        torch.manual_seed(self.seed)
        return self.build()

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches of a run, the same at each call."""
        order = torch.Generator().manual_seed(self.seed)
        kept = self.steps_per_epoch * self.batch
        for _ in range(epochs):
            for rows in torch.randperm(len(self.x), generator=order)[:kept].split(self.batch):
                yield self.x[rows], self.y[rows]


def random_problem(seed: int) -> Problem:
    """The same problem for the same seed; the family is the seed's remainder by five."""
    draw = random.Random(seed)
    family = list(FAMILIES)[seed % len(FAMILIES)]
    data = draw.choice(DATA_OF[family])
    loss = draw.choice(list(LOSSES))
    x, scores = DATA[data]()
    about, layers = FAMILIES[family](draw, x)
    weights, initialize = random_initialization(draw, family)
    batch = draw.choice(BATCHES)

    def build() -> nn.Module:
        net = layers()
        initialize(net)
        return net

    words = f"{family}: {about}; {weights} weights; {data}, {loss}, batch {batch}"
    return Problem(words, seed, build, x, targets(scores, loss), LOSSES[loss], batch)


def targets(scores: Tensor, loss: str) -> Tensor:
    """What the loss takes: the class of the largest score, the signs of all as 0 and 1, or the scores themselves."""
    if loss == "cross-entropy":
        return scores.argmax(1)
    return (scores > 0).float() if loss == "BCE" else scores


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """1437 digits of 1x8x8."""
    return digits().x, _indicators(digits().y)


@functools.cache
def vectors() -> tuple[Tensor, Tensor]:
    """The digits as vectors."""
    x, scores = images()
    return x.flatten(1), scores


@functools.cache
def lines() -> tuple[Tensor, Tensor]:
    """The digits as sequences of eight lines."""
    x, scores = images()
    return x[:, 0], scores


@functools.cache
def waves() -> tuple[Tensor, Tensor]:
    """Noisy sine waves at 16 times; the class is the frequency."""
    g = torch.Generator().manual_seed(1)
    classes = torch.randint(CLASSES, (ROWS, 1), generator=g)
    phases = 6.28 * torch.rand(ROWS, 1, generator=g)
    x = torch.sin((0.2 + 0.25 * classes) * torch.arange(16) + phases)
    return (x + 0.3 * torch.randn(x.shape, generator=g))[:, :, None], _indicators(classes[:, 0])


@functools.cache
def teacher(inputs: int = 20, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Outputs of a random net, standardized, with some noise."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, inputs, generator=g)
    inner = torch.randn(inputs, 32, generator=g) / inputs**0.5
    outer = torch.randn(32, CLASSES, generator=g)
    scores = torch.tanh(2 * x @ inner) @ outer
    scores = (scores - scores.mean(0)) / scores.std(0)
    return x, scores + 0.1 * torch.randn(scores.shape, generator=g)


def _indicators(classes: Tensor) -> Tensor:
    """A column for each class, standardized."""
    own = F.one_hot(classes, CLASSES).float()
    return (own - own.mean(0)) / own.std(0)


DATA: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "digits": images,
    "digits as vectors": vectors,
    "digits line by line": lines,
    "waves": waves,
    "a random teacher": teacher,
}
DATA_OF = {
    "perceptron": ("digits as vectors", "a random teacher"),
    "convolutions": ("digits",),
    "residual": ("digits",),
    "attention": ("digits line by line", "waves"),
    "recurrent": ("digits line by line", "waves"),
}

Drawn = tuple[str, Callable[[], nn.Module]]  # what was drawn, in words, and what makes the net


def perceptron(draw: random.Random, x: Tensor) -> Drawn:
    widths = [draw.choice((16, 32, 64, 96, 128)) for _ in range(draw.randint(1, 4))]
    activation = draw.choice(list(ACTIVATIONS))
    norm = draw.choice(("", "batch norm", "layer norm"))
    dropout = draw.choice((0.0, 0.0, 0.1, 0.3))

    def build() -> nn.Module:
        modules: list[nn.Module] = []
        before = x.shape[1]
        for width in widths:
            modules.append(nn.Linear(before, width))
            if norm:
                modules.append(nn.BatchNorm1d(width) if norm == "batch norm" else nn.LayerNorm(width))
            modules += [ACTIVATIONS[activation](), nn.Dropout(dropout)]
            before = width
        return nn.Sequential(*modules, nn.Linear(before, CLASSES))

    return _words("-".join(map(str, widths)), activation, norm, _dropout(dropout)), build


def convolutions(draw: random.Random, x: Tensor) -> Drawn:
    channels = [draw.choice((8, 12, 16, 24)) for _ in range(draw.randint(1, 3))]
    activation = draw.choice(list(ACTIVATIONS))
    norm = draw.choice(("", "batch norm"))
    dropout = draw.choice((0.0, 0.0, 0.1, 0.3))

    def build() -> nn.Module:
        modules: list[nn.Module] = []
        before = x.shape[1]
        for after in channels:
            modules.append(nn.Conv2d(before, after, 3, padding=1))
            if norm:
                modules.append(nn.BatchNorm2d(after))
            modules.append(ACTIVATIONS[activation]())
            before = after
        head = nn.Linear(before * 16, CLASSES)  # of 4x4 positions
        return nn.Sequential(*modules, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout), head)

    return _words("-".join(map(str, channels)), activation, norm, _dropout(dropout)), build


class Shortcut(nn.Module):
    """A module beside the identity."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return x + inner


def residual(draw: random.Random, x: Tensor) -> Drawn:
    channels = draw.choice((8, 12, 16))
    blocks = draw.randint(1, 3)
    activation = draw.choice(list(ACTIVATIONS))
    norm = draw.choice(("", "batch norm"))

    def block() -> nn.Module:
        modules: list[nn.Module] = []
        for _ in range(2):
            if norm:
                modules.append(nn.BatchNorm2d(channels))
            modules += [ACTIVATIONS[activation](), nn.Conv2d(channels, channels, 3, padding=1)]
        return Shortcut(nn.Sequential(*modules))

    def build() -> nn.Module:
        stem = nn.Conv2d(x.shape[1], channels, 3, stride=2, padding=1)
        head = nn.Linear(channels * 16, CLASSES)  # of 4x4 positions
        return nn.Sequential(stem, *(block() for _ in range(blocks)), nn.Flatten(), head)

    return _words(f"{blocks} blocks of {channels} channels", activation, norm), build


class Attention(nn.Module):
    """Blocks of attention over a sequence of vectors; the mean of its positions is classified."""

    def __init__(self, features: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.position)).mean(1))
        return outputs


def attention(draw: random.Random, x: Tensor) -> Drawn:
    width = draw.choice((16, 32, 48))
    heads = draw.choice((1, 2, 4))
    blocks = draw.randint(1, 2)
    _, length, features = x.shape
    return f"{blocks} blocks of {heads} x {width // heads}", lambda: Attention(features, length, width, heads, blocks)


class Recurrent(nn.Module):
    """Recurrent layers over a sequence of vectors; the last state is classified."""

    def __init__(self, kind: str, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.recurrent = RECURRENT[kind](features, width, layers, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(x)
        outputs: Tensor = self.head(states[:, -1])
        return outputs


def recurrent(draw: random.Random, x: Tensor) -> Drawn:
    kind = draw.choice(list(RECURRENT))
    width = draw.choice((16, 32, 48, 64))
    layers = draw.randint(1, 2)
    return f"{kind}, {layers} layers of {width}", lambda: Recurrent(kind, x.shape[2], width, layers)


FAMILIES: dict[str, Callable[[random.Random, Tensor], Drawn]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "residual": residual,
    "attention": attention,
    "recurrent": recurrent,
}

INITIALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch's": lambda w: w,
    "Xavier": nn.init.xavier_uniform_,
    "Kaiming": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "normal 0.02": lambda w: nn.init.normal_(w, std=0.02),
}


def random_initialization(draw: random.Random, family: str) -> tuple[str, Callable[[nn.Module], None]]:
    """What was drawn, in words, and what sets a net's initial weights; normal 0.02 is a habit with attention only."""
    name = draw.choice([name for name in INITIALIZATIONS if name != "normal 0.02" or family == "attention"])
    scale = draw.choice((0.5, 1.0, 2.0))

    @torch.no_grad()
    def initialize(net: nn.Module) -> None:
        for w in net.parameters():
            if w.ndim > 1:
                INITIALIZATIONS[name](w)
                w.mul_(scale)

    return f"{name} x {scale:g}", initialize


def _dropout(share: float) -> str:
    return f"dropout {share:g}" if share else ""


def _words(*words: str) -> str:
    return ", ".join(word for word in words if word)
