"""Made-up sweeps: rows with a known shape, written as a sweep writes them."""

import csv
import json
import random
from dataclasses import dataclass, field

from ipca.lab.baselines import CONTROLS, kind_of, position_of
from ipca.lab.sweep.plan import MATCHED
from ipca.lab.sweep.trial import COLUMNS

WINDOWS = ("0.0", "0.125", "0.25", "0.5", "0.75", "0.875", "1.0")


@dataclass
class Made:
    """What the made-up truth is.

    Attributes:
        left, right: how much more the principal and the minor end forget at the middle rate.
        lora: how much more plain LoRA keeps than the middle windows.
        magnitude: whether the ends forget by their singular values (matched controls keep) or their directions.
        noise: standard deviation of a metric over seeds; half as much is shared by all methods of a seed.
        fails: method → lowest rate at which every run of it fails.
    """

    left: float = 0.2
    right: float = 0.08
    lora: float = 0.0
    magnitude: bool = True
    noise: float = 0.01
    windows: tuple = WINDOWS
    methods: tuple = ("lora", "full", "auto", *CONTROLS)
    lrs: tuple = (5e-4, 1e-3, 2e-3)
    seeds: int = 10
    comparisons: tuple = ("same", "sqrt-sigma", "update")
    checkpoints: tuple = ()
    extra: tuple = ("drift",)
    drop: tuple = ()
    fails: dict = field(default_factory=dict)
    labels: dict = field(default_factory=lambda: {"target": "accuracy on reviews", "retained": "accuracy of the probe"})

    def loss(self, method):
        """Of ``retained`` at the middle rate."""
        f = position_of(method)
        if f is not None:
            return 0.03 + (self.left * (1 - 2 * f) ** 2 if f < 0.5 else self.right * (2 * f - 1) ** 2)
        special = {"lora": 0.03 - self.lora, "full": 0.15, "auto": 0.025, "haar": 0.06, "random-window": 0.07}
        special["matched-principal"] = 0.03 + (0 if self.magnitude else self.left)
        special["matched-minor"] = 0.03 + (0 if self.magnitude else self.right)
        return special.get(method, 0.03)

    def rows(self):
        base = {"target": 0.5, "retained": 0.85, "drift": 0.0, "kl": 0.0}
        rows = [{**dict.fromkeys(COLUMNS), "method": "base", "kind": "base", "status": "ok"}]
        rows[0] |= {name: base[name] for name in ("target", "retained", *self.extra)}
        for comparison in self.comparisons:
            for method in (*self.windows, *self.methods):
                if kind_of(method) not in MATCHED.get(comparison, (kind_of(method),)):
                    continue
                if comparison == "update" and method == "0.5":
                    continue
                for lr in self.lrs:
                    for seed in range(self.seeds):
                        rows += self.trial(method, comparison, lr, seed)
        return rows

    def trial(self, method, comparison, lr, seed):
        shared = random.Random(f"{seed}").gauss(0, self.noise / 2)
        own = random.Random(f"{method} {comparison} {lr} {seed}")
        middle = self.lrs[(len(self.lrs) - 1) // 2]
        scale = (lr / middle) ** 0.7
        loss = self.loss(method) * scale * {"same": 1, "sqrt-sigma": 0.6, "update": 0.15}[comparison]
        failed = method in self.fails and lr >= self.fails[method] and comparison == "same"
        rows = []
        for step in (*self.checkpoints, None):
            share = 1 if step is None else step / (2 * max(self.checkpoints))
            target = 0.5 + 0.27 * share * min(1, scale) - 0.3 * max(0, loss - 0.1) + shared + own.gauss(0, self.noise)
            metrics = {"target": target, "retained": 0.85 - loss * share + shared + own.gauss(0, self.noise)}
            metrics |= {name: 0.05 + 2 * loss * share + own.gauss(0, self.noise) for name in self.extra}
            numbers = {"update": 0.02 * scale * share, **metrics}
            rows.append(
                {
                    "method": method, "kind": kind_of(method), "position": position_of(method),
                    "comparison": comparison, "lr": lr, "lr_used": lr if comparison != "update" else lr * 1.7,
                    "seed": seed, "step": step, "trainable": 12345, "early_update": 0.004 * scale,
                    "status": "failed: diverged, update is not finite" if failed else "ok",
                    **(dict.fromkeys(numbers) if failed else numbers),
                }
            )  # fmt: skip
        return rows

    def write(self, folder):
        """``rows.csv`` and ``settings.json`` in ``folder``, which is returned."""
        fixed = {"device": "cpu x86_64", "threads": 1, "early": 10, "checkpoints": list(self.checkpoints)}
        fixed["versions"] = {"python": "3.11.7", "torch": "2.13.0+cpu"}
        fixed["settings"] = {"rank": 16, "window": "middle", "targets": ["intermediate.dense"], "exclude": None}
        grid = {"windows": self.windows, "lrs": self.lrs, "seeds": list(range(self.seeds)), "methods": self.methods}
        grid |= {"comparisons": self.comparisons, "reference": "0.5", "labels": self.labels, "rank": 16}
        return write_rows(folder, self.rows(), {**grid, "fixed": fixed}, self.drop)


def by_hand(method, seed, target, retained, *, lr=1e-3, comparison="same", status="ok", **more):
    """One row with the numbers given."""
    known = {"kind": kind_of(method), "position": position_of(method), "lr_used": lr, "step": None, "update": 0.01}
    numbers = {"target": target, "retained": retained} if status == "ok" else {}
    row = {"method": method, "comparison": comparison, "lr": lr, "seed": seed, "status": status}
    return {**dict.fromkeys(COLUMNS), **known, **row, **numbers, **more}


def write_rows(folder, rows, settings=None, drop=()):
    """``rows`` and ``settings`` as a sweep's folder, without the columns in ``drop``."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = sorted({name for row in rows for name in row} - set(COLUMNS))
    columns = [name for name in (*COLUMNS, *extra) if name not in drop]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "settings.json").write_text(json.dumps({"reference": "0.5"} if settings is None else settings))
    return folder
