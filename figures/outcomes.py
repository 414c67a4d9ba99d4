"""What the claims and their pictures ask of the measured rows of a stage at one seed: levels, paths, KL efficiency."""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kl  # noqa: E402
from figures.experiments import measured  # noqa: E402

LEVELS = (1 / 3, 1 / 2, 2 / 3)  # of the way from the base's accuracy to 1
T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided, by degrees of freedom


class Outcome:
    """The rows of a stage at one seed, and what the claims ask of them."""

    def __init__(self, rows: list[dict]):
        self.rows = [row | {"method": f"clip + KL {row['kl_coef']:g}"} if row["method"] == "clip + KL" else row
                     for row in rows]
        base = self.one("base")
        self.base, self.entropy = base["accuracy"], base["entropy"]
        self.limit = kl.least_kl(torch.tensor(base["pass_rates"]), points=2000)
        self.levels = [self.base + share * (1 - self.base) for share in LEVELS]

    def of(self, method: str, **fields) -> list[dict]:
        return [row for row in self.rows if row["method"] == method and all(row.get(k) == v for k, v in fields.items())]

    def one(self, method: str, **fields) -> dict:
        return self.of(method, **fields)[0]

    def explorer(self, method: str = "sapo", lr: float = 3e-5) -> list[dict]:
        """An explorer's checkpoints by epoch."""
        return sorted(self.of(method, lr=lr), key=lambda row: row["at"])

    def paths(self, method: str) -> list[list[dict]]:
        """The rows of a method path by path, each in the order in which it leads away from the base."""
        paths: dict[str, list[dict]] = {}
        for row in self.of(method):
            name = row["path"] if method != "temperature" else "colder" if row["at"] < 1 else "hotter"
            paths.setdefault(name, []).append(row)
        return [sorted(path, key=lambda row: -row["at"] if name == "colder" else row["at"])
                for name, path in paths.items()]

    def best(self, *methods: str) -> float:
        return max((row["accuracy"] for method in methods for row in self.of(method)), default=math.nan)

    def kl_at(self, method: str, accuracy: float) -> float:
        """The least KL at which a path of the method reaches an accuracy; infinite where none does."""
        return min((kl_on_path(path, self.base, accuracy) for path in self.paths(method)), default=math.inf)

    def least(self, accuracy: float) -> float:
        """The KL of the limit at an accuracy."""
        return interpolate(accuracy, *self.limit)

    def efficiency(self, method: str, level: float) -> float:
        return self.least(level) / self.kl_at(method, level)

    def worth(self, row: dict) -> float:
        """KL efficiency of a single policy, at the accuracy that it has."""
        return self.least(row["accuracy"]) / row["kl"] if row["accuracy"] > self.base else 0.0


def interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """y at x on the line through points with rising xs; infinite beyond the last."""
    for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]):
        if x0 <= x <= x1:
            return y0 + (x - x0) / max(x1 - x0, 1e-12) * (y1 - y0)
    return ys[0] if x < xs[0] else math.inf


def kl_on_path(path: list[dict], start: float, accuracy: float) -> float:
    """KL where a path from the base (accuracy `start`, KL 0) first reaches an accuracy; between points linear in √KL.
    """
    reached, root = start, 0.0
    for row in path:
        after = math.sqrt(max(0.0, row["kl"]))
        if reached < accuracy <= row["accuracy"]:
            return (root + (accuracy - reached) / (row["accuracy"] - reached) * (after - root)) ** 2
        reached, root = row["accuracy"], after
    return math.inf


def mean_interval(values: list[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), T95[min(len(x) - 1, 9)] * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def outcomes(results: Path) -> dict[str, list[Outcome]]:
    """The outcomes by stage; a seed counts once its jobs are all there."""
    found: dict[tuple, list[dict]] = {}
    for row in measured(results):
        found.setdefault((row["stage"], row["seed"]), []).append(row)
    by_stage: dict[str, list[Outcome]] = {}
    for (name, _), rows in sorted(found.items(), key=lambda item: item[0][1]):
        done = {row["job"] for row in rows}
        last = {"erpd", "weights: erpd", "weights: nll", "weights: sapo"}
        last = {"small after grpo"} if name == "64 prompts" else last
        if last <= done:
            by_stage.setdefault(name, []).append(Outcome(rows))
    return by_stage
