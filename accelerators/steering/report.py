"""What a steered run or a search did: who came from whom, what everybody was worth, who survived, and what it cost."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hasten.accelerators.steering.budget import COUNTED, Meter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = -1
"""The parent of a node that has none."""


class Node(NamedTuple):
    """One candidate at one stage.

    Attributes:
        stage: The step of a steered run, the round or iteration of a search.
        parent: Number of the node it came from, or `ROOT`.
        reward: Its value then; NaN where it was not scored.
        prompt: Number of its prompt.
        slot: Its row among the prompt's candidates at this stage.
    """

    stage: int
    parent: int
    reward: float
    prompt: int = 0
    slot: int = 0


@dataclass
class Lineage:
    """The family tree of a run's candidates. Nodes are numbered in the order in which they were added, parents first."""

    nodes: list[Node] = field(default_factory=list)
    _filled: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.nodes)

    def add(
        self, stage: int, parents: Sequence[int], rewards: Sequence[float], prompt: int = 0, slots: Sequence[int] | None = None
    ) -> range:
        """Adds the candidates of one stage of one prompt.

        Args:
            stage: Not below that of any parent.
            parents: Numbers of nodes, or `ROOT`.
            rewards: One for each.
            prompt: Number of the prompt.
            slots: Their rows; unless told, the next ones of the prompt's stage.

        Returns:
            Their numbers.
        """
        begin = len(self.nodes)
        filled = self._filled.get((prompt, stage), 0)
        places = range(filled, filled + len(parents)) if slots is None else slots
        self._filled[prompt, stage] = filled + len(parents)
        for parent, reward, slot in zip(parents, rewards, places, strict=True):
            if not ROOT <= parent < begin:
                raise ValueError(f"a parent must be a node that was added before, from {ROOT} to {begin - 1}, not {parent}")
            self.nodes.append(Node(int(stage), int(parent), float(reward), prompt, int(slot)))
        return range(begin, len(self.nodes))

    def ancestry(self, node: int) -> list[int]:
        """The node's line from its root to itself."""
        line = []
        while node != ROOT:
            line.append(node)
            node = self.nodes[node].parent
        return line[::-1]

    def stages(self, prompt: int = 0) -> list[int]:
        """Stages at which the prompt's candidates were scored, ascending."""
        return sorted({node.stage for node in self.nodes if node.prompt == prompt})

    def at(self, stage: int, prompt: int = 0) -> list[int]:
        """Numbers of the prompt's candidates at a stage."""
        return [i for i, node in enumerate(self.nodes) if node.stage == stage and node.prompt == prompt]

    def unique_ancestors(self, prompt: int = 0) -> int:
        """How many of the prompt's roots still have descendants at its last stage; 1 means that the population has collapsed."""
        stages = self.stages(prompt)
        return len({self.ancestry(node)[0] for node in self.at(stages[-1], prompt)}) if stages else 0


@dataclass
class SearchReport:
    """One steered run or search. `print(report)` is for people, `to_json()` for machines.

    Attributes:
        method: What was run, with its settings.
        lineage: Who came from whom.
        selected: For every prompt, the numbers of the nodes that were returned, best first.
        meter: What was spent, of what budget.
        facts: What the method has to tell: particles, schedule, effective sample sizes.
        warnings: What was not done as asked, and why.
        pictures: uint8 [H, W, 3] of nodes, by their number, where they were asked for.
    """

    method: str
    lineage: Lineage
    selected: list[list[int]]
    meter: Meter
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def rewards(self) -> list[float]:
        """The reward of every prompt's best returned sample; NaN where it was not scored."""
        return [self.lineage.nodes[nodes[0]].reward if nodes else math.nan for nodes in self.selected]

    @property
    def survivors(self) -> list[set[int]]:
        """For every prompt, the nodes on the lines that lead to what was returned."""
        return [{node for end in nodes for node in self.lineage.ancestry(end)} for nodes in self.selected]

    def curve(self, prompt: int = 0) -> list[tuple[int, float, float, float]]:
        """(stage, mean, best, best so far) of the prompt's finite rewards, stage by stage; a stage without any is left out."""
        rows, so_far = [], -math.inf
        for stage in self.lineage.stages(prompt):
            rewards = [self.lineage.nodes[node].reward for node in self.lineage.at(stage, prompt)]
            finite = [reward for reward in rewards if math.isfinite(reward)]
            if finite:
                so_far = max(so_far, *finite)
                rows.append((stage, sum(finite) / len(finite), max(finite), so_far))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Plain data, without NaN or infinity: such rewards are None."""

        def plain(reward: float) -> float | None:
            return reward if math.isfinite(reward) else None

        nodes = [[node.stage, node.parent, plain(node.reward), node.prompt, node.slot] for node in self.lineage.nodes]
        return {
            "method": self.method,
            "cost": self.meter.to_json(),
            "selected": self.selected,
            "rewards": [plain(reward) for reward in self.rewards],
            "unique_ancestors": [self.lineage.unique_ancestors(prompt) for prompt in range(len(self.selected))],
            "nodes": {"columns": ["stage", "parent", "reward", "prompt", "slot"], "rows": nodes},
            "facts": self.facts,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        lines = [self.method, f"spent {self.meter}"]
        unspent = {name: getattr(self.meter.budget, name) for name in COUNTED if getattr(self.meter.budget, name) is not None}
        if unspent:
            left = ", ".join(f"{limit - getattr(self.meter.spent, name)} {name.replace('_', ' ')}" for name, limit in unspent.items())
            lines.append(f"left {left}")
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        for prompt in range(len(self.selected)):
            if len(self.selected) > 1:
                lines.append(f"prompt {prompt}")
            for stage, mean, best, so_far in self.curve(prompt):
                lines.append(f"{stage:4d}  mean {mean:10.4f}  best {best:10.4f}  so far {so_far:10.4f}")
            lines.append(f"returned {self.rewards[prompt]:.4f}, unique ancestors {self.lineage.unique_ancestors(prompt)}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def plot_lineage(self, target: str | os.PathLike[str] | Axes | None = None, prompt: int = 0, title: str | None = None) -> Axes:
        """Draws the family tree of one prompt: a column for each stage, a dot for each candidate in the colour of its reward, and the
        lines to what was returned in bold.

        Args:
            target: A file to write (PNG, SVG, PDF), axes to draw on, or None for new axes.
            prompt: Number of the prompt.
            title: Above the picture; the method unless told.
        """
        stages = self.lineage.stages(prompt)
        column = {stage: i for i, stage in enumerate(stages)}
        mine = [i for i, node in enumerate(self.lineage.nodes) if node.prompt == prompt]
        nodes = {i: self.lineage.nodes[i] for i in mine}
        place = {i: (column[node.stage], node.slot) for i, node in nodes.items()}
        tall = max((node.slot for node in nodes.values()), default=0) + 1
        axes = _axes(target, (max(4.0, 0.5 * len(stages) + 2), max(2.4, 0.22 * tall + 1.4)))
        kept = self.survivors[prompt]
        for i, node in nodes.items():
            if node.parent != ROOT:
                (x0, y0), (x1, y1) = place[node.parent], place[i]
                bold = i in kept
                axes.plot(
                    [x0, x1], [y0, y1], color="#1f5fa8" if bold else "#b8b8b8", linewidth=2.0 if bold else 0.7, zorder=2 if bold else 1
                )
        rewards = np.array([nodes[i].reward for i in mine])
        finite = np.isfinite(rewards)
        points = np.array([place[i] for i in mine]).reshape(-1, 2)
        if (~finite).any():
            axes.scatter(points[~finite, 0], points[~finite, 1], marker="x", color="#b03030", s=22, zorder=3, label="lost or not scored")
            axes.legend(fontsize=7, frameon=False)
        if finite.any():
            drawn = axes.scatter(
                points[finite, 0], points[finite, 1], c=rewards[finite], cmap="viridis", s=26, zorder=3, edgecolors="white", linewidths=0.4
            )
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.colorbar(drawn, ax=axes, label="reward")
        ends = np.array([place[i] for i in self.selected[prompt]]).reshape(-1, 2)
        axes.scatter(ends[:, 0], ends[:, 1], s=90, facecolors="none", edgecolors="#1f5fa8", linewidths=1.6, zorder=4)
        axes.set_xticks(range(len(stages)), [str(stage) for stage in stages])
        axes.set_xlabel("step or round")
        axes.set_ylabel("candidate")
        axes.invert_yaxis()
        axes.set_title(title or self.method, fontsize=9)
        return _written(axes, target)

    def plot_rewards(self, target: str | os.PathLike[str] | Axes | None = None, prompt: int = 0, title: str | None = None) -> Axes:
        """Draws the rewards of one prompt over the stages: every candidate, their mean, and the best so far.

        Args:
            target, prompt, title: As for `plot_lineage`.
        """
        axes = _axes(target, (5.0, 3.0))
        dots = [(node.stage, node.reward) for node in self.lineage.nodes if node.prompt == prompt and math.isfinite(node.reward)]
        if dots:
            axes.scatter([stage for stage, _ in dots], [reward for _, reward in dots], s=9, color="#b8b8b8", label="candidates")
            stages, mean, _, so_far = zip(*self.curve(prompt), strict=True)
            axes.plot(stages, mean, color="#f2a33c", marker="o", markersize=3, label="mean")
            axes.plot(stages, so_far, color="#1f5fa8", marker="o", markersize=3, label="best so far")
            axes.legend(fontsize=7, frameon=False)
        axes.set_xlabel("step or round")
        axes.set_ylabel("reward")
        axes.set_title(title or self.method, fontsize=9)
        return _written(axes, target)

    def plot_gallery(self, target: str | os.PathLike[str] | None = None, prompt: int = 0, title: str | None = None) -> Figure:
        """Draws what the candidates of one prompt looked like: a column for each stage, a row for each candidate, with their rewards; those
        on the lines that lead to what was returned are framed.

        Args:
            target: A file to write (PNG, SVG, PDF), or None.
            prompt, title: As for `plot_lineage`.

        Raises:
            ValueError: No pictures were kept.
        """
        from matplotlib.figure import Figure

        nodes = self.lineage.nodes
        shown = [i for i in self.pictures if nodes[i].prompt == prompt]
        if not shown:
            raise ValueError("no pictures were kept of this prompt; ask for them (keep_pictures=True) before the run")
        stages = sorted({nodes[i].stage for i in shown})
        tall = max(nodes[i].slot for i in shown) + 1
        figure = Figure(figsize=(1.25 * len(stages) + 0.4, 1.4 * tall + 0.5), layout="constrained")
        grid = figure.subplots(tall, len(stages), squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        kept = self.survivors[prompt]
        for i in shown:
            axes = grid[nodes[i].slot, stages.index(nodes[i].stage)]
            axes.axis("on")
            axes.imshow(self.pictures[i])
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_edgecolor("#1f5fa8" if i in kept else "#d0d0d0")
                spine.set_linewidth(2.5 if i in kept else 0.6)
            step = f"step {nodes[i].stage}: " if nodes[i].slot == 0 else ""
            axes.set_title(f"{step}{nodes[i].reward:.2f}", fontsize=7, pad=2)
        figure.suptitle(title or self.method, fontsize=9)
        if target is not None:
            figure.savefig(target, dpi=120)
        return figure


def _axes(target: str | os.PathLike[str] | Axes | None, size: tuple[float, float]) -> Axes:
    from matplotlib.axes import Axes as AxesType
    from matplotlib.figure import Figure

    return target if isinstance(target, AxesType) else Figure(figsize=size, layout="constrained").subplots()


def _written(axes: Axes, target: str | os.PathLike[str] | Axes | None) -> Axes:
    if isinstance(target, str | os.PathLike):
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(target, dpi=120)
    return axes
