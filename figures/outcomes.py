"""What claims and pictures ask of the rows of a stage at one seed: levels, paths, KL efficiency."""

import math
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Beta

import kl
from figures.experiments import measured

LEVELS = {"1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3, "5/6": 5 / 6}  # of the way from the base's accuracy to 1
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131, 2.120, 2.110, 2.101, 2.093)  # two-sided, by degrees of freedom


class Outcome:
    """The rows of a stage at one seed, and what the claims ask of them."""

    alike: tuple[list[float], list[float]] | None = None  # mending_alike, where the held-out chains are known

    def __init__(self, rows: list[dict]):
        self.rows = [dict(row) for row in rows]
        for row in self.rows:
            if row.get("kl_coef"):
                row["method"] += f" {row['kl_coef']:g}"  # clip + KL 0.2
        base = self.one("base")
        self.base, self.entropy, self.samples = base["accuracy"], base["entropy"], base["samples"]
        self.right = (torch.tensor(base["pass_rates"], dtype=torch.float64) * self.samples).round()
        self.rates = kl.smoothed(self.right, self.samples)
        self.limit = kl.least_kl(self.rates, points=2000)
        self.levels = [self.level(share) for share in LEVELS.values()]

    def level(self, share: float) -> float:
        """The accuracy a share of the way from the base's to 1."""
        return self.base + share * (1 - self.base)

    def limits(self, draws: int = 200) -> list[tuple[list[float], list[float]]]:
        """The limit for pass rates drawn from Jeffreys' posterior: what the base's samples leave open."""
        torch.manual_seed(0)
        rates = Beta(self.right + 0.5, self.samples - self.right + 0.5).sample((draws,))
        return [kl.least_kl(one, points=400) for one in rates]

    def of(self, method: str, **fields) -> list[dict]:
        wanted = fields | {"method": method}
        return [row for row in self.rows if wanted.items() <= row.items()]

    def one(self, method: str, **fields) -> dict:
        return self.of(method, **fields)[0]

    def paths(self, method: str) -> list[list[dict]]:
        """The rows of a method path by path, each as it leads away from the base."""
        paths: dict[tuple, list[dict]] = {}
        base = 1 if method == "temperature" else 0  # where on a path the base is
        for row in sorted(self.of(method), key=lambda row: abs(row["at"] - base)):
            paths.setdefault((row["path"], row["at"] < base), []).append(row)
        return list(paths.values())

    def best_path(self, method: str) -> list[dict]:
        """The path that ends highest."""
        return max(self.paths(method), key=lambda path: path[-1]["accuracy"])

    def best(self, method: str) -> float:
        """The ceiling: the highest accuracy on a method's paths."""
        return max((row["accuracy"] for row in self.of(method)), default=math.nan)

    def kl_at(self, method: str, accuracy: float) -> float:
        """The least KL at which a path of the method reaches an accuracy; ∞ where none does."""
        return min((kl_on_path(path, self.base, accuracy) for path in self.paths(method)), default=math.inf)

    def least(self, accuracy: float, limit: tuple[list[float], list[float]] | None = None) -> float:
        """The KL of the limit, or of another, at an accuracy."""
        return float(np.interp(accuracy, *(limit or self.limit), right=math.inf))

    def efficiency(self, method: str, level: float, limit: tuple[list[float], list[float]] | None = None) -> float:
        """KL of the limit, or of another, over the method's at an accuracy; NaN where no path gets there."""
        spent = self.kl_at(method, level)
        return self.least(level, limit) / spent if math.isfinite(spent) else math.nan

    def worth(self, row: dict) -> float:
        """KL efficiency of a policy at its own accuracy; 0 where that is not above the base's."""
        return self.least(row["accuracy"]) / row["kl"] if row["accuracy"] > self.base else 0.0

    def still_rising(self) -> list[str]:
        """Direct methods' paths that end too early: above the last but one checkpoint's interval."""
        methods = dict.fromkeys(row["method"] for row in self.rows if "fallen" in row)
        ends = [path[-2:] for method in methods for path in self.paths(method) if len(path) > 1]
        return [f"{last['method']}, {last['path']}, update {last['at']}" for before, last in ends
                if last["accuracy"] > before["accuracy_interval"][1]]


def mending_alike(rates: torch.Tensor, carries: torch.Tensor) -> tuple[list[float], list[float]]:
    """(accuracies, KL): the least of policies that mend a carry as often where its chain is lost by then as elsewhere.

    A problem of n `carries` that the base has right with p, one of its `rates` [P], has e = p^(1/n) at each (n = 1
    where there is none). Mended to m it is right with m^n and costs n·KL(m‖e), the least where all its carries are
    alike, since that is convex in log m. Over problems the least is where all pay one price for being right.
    (kl.least_kl spends nothing where a chain is lost, and so more of it late.)
    """
    n = carries.clamp(min=1)[:, None]
    each = rates[:, None] ** (1 / n)
    odds = each / (1 - each) * torch.linspace(0, 12, 1000, dtype=torch.float64).exp()
    mended = odds / (1 + odds)
    right, spent = mended ** n, n * kl.coin_kl(mended, each)
    chosen = torch.stack([(price * right - spent).argmax(1) for price in torch.linspace(0, 3.5, 400) ** 2], 1)
    return right.gather(1, chosen).mean(0).tolist(), spent.gather(1, chosen).mean(0).tolist()


def first_crossing(points: list[tuple[float, float]], accuracy: float) -> float:
    """x where the line through points (accuracy, x) first rises to an accuracy; ∞ where it never does."""
    for (a0, x0), (a1, x1) in zip(points, points[1:]):
        if a0 < accuracy <= a1:
            return x0 + (accuracy - a0) / (a1 - a0) * (x1 - x0)
    return math.inf


def kl_on_path(path: list[dict], start: float, accuracy: float) -> float:
    """KL where a path from the base (accuracy `start`) first reaches an accuracy, linear in √KL."""
    roots = [(row["accuracy"], math.sqrt(max(0.0, row["kl"]))) for row in path]
    return first_crossing([(start, 0.0), *roots], accuracy) ** 2


def mean_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) over the seeds that have a value; NaN where unknown."""
    x = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    half = T95[min(len(x), len(T95)) - 1] * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return x.mean().item(), half


def outcomes(results: Path, needed=("erpd", "weights: nll", "weights: sapo")) -> dict[str, list[Outcome]]:
    """The outcomes by stage; a seed counts once it has the jobs that are needed."""
    found: dict[tuple, list[dict]] = {}
    for row in measured(results):
        found.setdefault((row["stage"], row["seed"]), []).append(row)
    by_stage: dict[str, list[Outcome]] = {}
    for (name, _), rows in sorted(found.items(), key=lambda item: item[0][1]):
        if set(needed) <= {row["job"] for row in rows}:
            by_stage.setdefault(name, []).append(Outcome(rows))
    return by_stage
