"""A plan says, for each step, site and guidance branch, whether a block is computed, its cached offset reused, or forecast from several.

It is data, not code: it saves to one safetensors file with JSON metadata and a checksum, and is refused where it does not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hasten.accelerators.caching.trace import Trace

FORMAT_VERSION = 1
ROW = "#"
"""Between a guidance branch and a row of the batch, where the rows of a recorded run decided differently."""
ALL_BRANCHES = "*"
"""The one branch of a plan that treats every guidance branch alike."""
GUIDANCE = "guidance"
"""The site that stands for the whole denoiser: where it says `SKIP_BRANCH`, only the conditional guidance branch is computed."""

HARD_FACTS = ("model", "config", "steps", "guidance", "scheduler", "order")
"""What must agree before a plan is carried out."""
SOFT_FACTS = ("dtype", "resolution")
"""What is warned of."""
SIGMA_TOLERANCE = 0.05
_CORRECTION, _TABLE = "correction.", "table."


class Action(IntEnum):
    """What happens to a site at a step."""

    COMPUTE = 0
    REUSE = 1
    FORECAST = 2
    SKIP_BRANCH = 3


MARKS = "#.~-"
"""How actions are printed."""


class PlanError(ValueError):
    """A plan is malformed or does not fit; the message says in one line what differs."""


class _Facts(dict[str, Any]):
    """A dictionary that cannot be changed, and that `json` takes for what it is."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a plan cannot be changed; make another one, with other facts or corrections")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _Facts, (dict(self),)


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps x sites x guidance branches of actions, and the facts it is bound to.

    Attributes:
        actions: uint8 [steps, sites, branches] of `Action` ([steps, sites] is taken as one branch). Row k is the k-th executed
            step; the two calls of a second-order step share a row.
        sites: Paths of the blocks, in call order; the last may be `GUIDANCE`, whose cells say whether both guidance branches run.
        branches: Names of the guidance branches; ("*",) treats all alike.
        weights: float32 [steps, sites, branches, terms] or None: what a forecast adds is the sum of the site's last computed offsets,
            newest first, by these weights. Where all are 0, or there are none, the weights are those of the polynomial through the
            last `forecast_order + 1` of them (a fact; 1 unless told), drawn over the noise level.
        corrections: By site, float32 [2, steps, branches, channels]: scale and shift of what is reused there. A span of blocks is
            corrected by what stands at its last block, on the first stream.
        tables: Further arrays of numbers that the plan's facts refer to: the activation ranges of quantised layers.
        facts: What it is bound to: model, config, steps, and, once it was executed, scheduler, order, guidance, sigmas, dtype,
            resolution; anything else is kept as a note.

    Raises:
        PlanError: Shapes disagree, an action is unknown, names repeat, or the facts are no plain data.
    """

    actions: np.ndarray
    sites: tuple[str, ...]
    branches: tuple[str, ...] = (ALL_BRANCHES,)
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights: np.ndarray | None = None
    corrections: Mapping[str, np.ndarray] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        actions = np.asarray(self.actions)
        if actions.ndim == 2:
            actions = actions[:, :, None]
        if actions.ndim != 3 or not np.issubdtype(actions.dtype, np.integer):
            raise PlanError(f"actions must be whole numbers of shape [steps, sites, branches], not {actions.dtype} {actions.shape}")
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "branches", tuple(self.branches))
        if actions.shape[1:] != (len(self.sites), len(self.branches)) or actions.shape[0] == 0:
            raise PlanError(
                f"actions have shape {actions.shape}, but there are {len(self.sites)} sites and {len(self.branches)} branches "
                "(and a plan needs at least one step)"
            )
        for what, names in (("site", self.sites), ("branch", self.branches)):
            if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
                raise PlanError(f"every {what} of a plan needs a name of its own, not {names}")
        if len(self.branches) > 1 and ALL_BRANCHES in self.branches:
            raise PlanError(f"the branch {ALL_BRANCHES!r} means all of them and stands alone, not among {self.branches}")
        known = [int(action) for action in Action]
        if not np.isin(actions, known).all():
            raise PlanError(f"unknown action {int(actions[~np.isin(actions, known)][0])}; known are {[a.name for a in Action]}")
        elsewhere = [s for s, site in enumerate(self.sites) if site != GUIDANCE]
        if (actions[:, elsewhere] == Action.SKIP_BRANCH).any():
            raise PlanError(f"SKIP_BRANCH is said of the site {GUIDANCE!r} alone: no single block can be skipped for one branch")
        if GUIDANCE in self.sites:
            column = actions[:, self.sites.index(GUIDANCE)]
            if self.sites[-1] != GUIDANCE or not np.isin(column, [Action.COMPUTE, Action.SKIP_BRANCH]).all():
                raise PlanError(f"the site {GUIDANCE!r} stands last and is computed or skipped, nothing else")
        actions = np.array(actions, dtype=np.uint8, order="C")  # a copy: the caller's array stays the caller's
        actions.setflags(write=False)
        object.__setattr__(self, "actions", actions)
        try:
            facts = json.loads(json.dumps(dict(self.facts), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise PlanError(f"the facts of a plan must be plain JSON data: {error}") from None
        if self.weights is not None:
            weights = np.array(self.weights, dtype=np.float32, order="C")
            if weights.ndim != 4 or weights.shape[:3] != actions.shape or not np.isfinite(weights).all():
                raise PlanError(f"weights must be finite and of shape {[*actions.shape]} and a number of terms, not {[*weights.shape]}")
            weights.setflags(write=False)
            object.__setattr__(self, "weights", weights)
        corrections = {}
        for site, table in sorted(self.corrections.items()):
            table = np.array(table, dtype=np.float32, order="C")
            if site not in self.sites or table.ndim != 4 or table.shape[:3] != (2, actions.shape[0], actions.shape[2]):
                raise PlanError(
                    f"the correction of {site} must be for a site and of shape [2, steps, branches, channels], not {table.shape}"
                )
            if not np.isfinite(table).all():
                raise PlanError(f"the correction of {site} is not finite")
            table.setflags(write=False)
            corrections[site] = table
        object.__setattr__(self, "corrections", _Facts(corrections))
        tables = {name: np.array(table, dtype=np.float32, order="C") for name, table in sorted(self.tables.items())}
        if any(not np.isfinite(table).all() for table in tables.values()):
            raise PlanError("the tables of a plan must be finite")
        for table in tables.values():
            table.setflags(write=False)
        object.__setattr__(self, "tables", _Facts(tables))
        order = facts.get("forecast_order", 1)
        if type(order) is not int or order < 0:
            raise PlanError(f"forecast_order must be a whole number of at least 0, not {order!r}")
        facts.setdefault("steps", self.steps)
        if facts["steps"] != self.steps:
            raise PlanError(f"the plan has {self.steps} rows, but its facts say {facts['steps']} steps")
        object.__setattr__(self, "facts", _Facts(facts))

    @property
    def steps(self) -> int:
        """Number of rows."""
        return int(self.actions.shape[0])

    @property
    def hash(self) -> str:
        """16 hex digits that change with any action, name or fact."""
        return self._digest()[:16]

    def with_facts(self, **facts: Any) -> Plan:
        """The same plan with further facts; those that it has stay."""
        return replace(self, facts={**facts, **self.facts})

    def _digest(self) -> str:
        head = json.dumps([self.sites, self.branches, self.facts], sort_keys=True).encode()
        body = head + repr(self.actions.shape).encode() + self.actions.tobytes()
        if self.weights is not None:
            body += repr(self.weights.shape).encode() + self.weights.tobytes()
        for name, table in (*self.corrections.items(), *self.tables.items()):
            body += name.encode() + repr(table.shape).encode() + table.tobytes()
        return hashlib.sha256(body).hexdigest()

    def __hash__(self) -> int:
        return hash(self._digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._digest() == other._digest()

    def branch(self, name: str, order: int = 0) -> np.ndarray:
        """The actions [steps, sites] of one branch: the one of this name, else the one that stands at `order`, else the first.

        Args:
            name: A guidance branch of a run.
            order: How many branches the run had before it, for pipelines that name theirs differently.
        """
        return self.actions[:, :, self.branch_index(name, order)]

    @property
    def guidance_branches(self) -> tuple[str, ...]:
        """The branches, those of single rows taken together."""
        return tuple(dict.fromkeys(name.rpartition(ROW)[0] or name for name in self.branches))

    def rows_of(self, name: str, order: int = 0) -> np.ndarray | None:
        """The actions [rows, steps, sites] of a guidance branch whose rows have columns of their own; None where they have not."""
        known = self.guidance_branches
        name = name if name in known else known[order if order < len(known) else 0]
        found = [i for i, branch in enumerate(self.branches) if branch.rpartition(ROW)[0] == name]
        return self.actions[:, :, found].transpose(2, 0, 1) if found else None

    def branch_index(self, name: str, order: int = 0) -> int:
        """Number of the branch that `branch` means; of its first row where its rows have columns of their own."""
        if name in self.branches:
            return self.branches.index(name)
        known = [branch.rpartition(ROW)[0] or branch for branch in self.branches]
        if name in known:
            return known.index(name)
        names = self.guidance_branches
        return known.index(names[order if order < len(names) else 0])

    @property
    def forecast_order(self) -> int:
        """Order of the polynomial for forecasts that have no weights of their own."""
        return int(self.facts.get("forecast_order", 1))

    @property
    def skips(self) -> np.ndarray:
        """[steps] whether a guidance branch is skipped."""
        if GUIDANCE not in self.sites:
            return np.zeros(self.steps, bool)
        return np.asarray((self.actions[:, -1] == Action.SKIP_BRANCH).any(-1))

    @property
    def blocks(self) -> Plan:
        """The plan without its guidance site."""
        if GUIDANCE not in self.sites:
            return self
        weights = self.weights[:, :-1] if self.weights is not None else None
        return replace(self, actions=self.actions[:, :-1], sites=self.sites[:-1], weights=weights)

    @property
    def _shares(self) -> np.ndarray:
        """[steps, branches] of a branch's rows that are computed: a lone branch has the rows of both where guidance is batched."""
        skipped = self.actions[:, -1] == Action.SKIP_BRANCH if GUIDANCE in self.sites else np.zeros((self.steps, len(self.branches)), bool)
        return 1.0 - skipped * (1.0 if len(self.branches) > 1 else 0.5)

    @property
    def computed_fraction(self) -> float:
        """Share of the blocks' cells that are computed, a skipped branch counted out; 1 where there are no sites."""
        shares = self._shares
        computed = self.blocks.actions == Action.COMPUTE
        return float((computed * shares[:, None]).mean()) if computed.size else float(shares.mean())

    def speedup_bound(self, costs: Trace | tuple[Sequence[float], float]) -> float:
        """The speed-up if reuse were free: all sites computed at all steps, over what the plan computes.

        Args:
            costs: A trace with the plan's sites, or (seconds of every site, seconds of everything else per step).

        Raises:
            PlanError: The trace has other sites.
        """
        sites = self.blocks.sites
        if isinstance(costs, tuple):
            seconds, rest = costs
        else:
            if costs.kind_of(sites) is None:
                raise PlanError(f"the plan is for {len(sites)} sites such as {sites[:1]}, the trace has {costs.sites[:3]}")
            seconds, rest = costs.costs(sites)
        per_call = np.einsum("ksb,s->kb", self.blocks.actions == Action.COMPUTE, np.asarray(seconds, dtype=np.float64)) + rest
        computed = float((per_call * self._shares).mean())
        return (float(sum(seconds)) + rest) / computed if computed > 0 else math.inf

    # ------------------------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to one file; an interrupted write leaves no half file.

        Raises:
            PlanError: The folder cannot be written to.
        """
        target = Path(path)
        head = {
            "format_version": FORMAT_VERSION,
            "sites": self.sites,
            "branches": self.branches,
            "facts": self.facts,
            "digest": self._digest(),
        }
        scratch_name = None
        tensors = {"actions": self.actions} | ({"weights": self.weights} if self.weights is not None else {})
        tensors |= {f"{_CORRECTION}{site}": table for site, table in self.corrections.items()}
        tensors |= {f"{_TABLE}{name}": table for name, table in self.tables.items()}
        data = safetensors.numpy.save(tensors, metadata={"hasten_plan": json.dumps(head)})
        try:
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as scratch:
                scratch_name = scratch.name
                scratch.write(data)
            os.chmod(scratch_name, 0o644)  # temporary files are made for their owner alone
            os.replace(scratch_name, target)
        except OSError as error:
            if scratch_name is not None:
                os.unlink(scratch_name)
            raise PlanError(f"cannot write the plan to {target}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan.

        Raises:
            PlanError: The file is missing, truncated, no plan, of another format version, or was altered.
        """
        try:
            with safetensors.safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                keys = set(file.keys())
                actions = file.get_tensor("actions") if "actions" in keys else None
                weights = file.get_tensor("weights") if "weights" in keys else None
                tables = {key.removeprefix(_TABLE): file.get_tensor(key) for key in keys if key.startswith(_TABLE)}
                corrections = {key.removeprefix(_CORRECTION): file.get_tensor(key) for key in keys if key.startswith(_CORRECTION)}
        except FileNotFoundError:
            raise PlanError(f"there is no plan file {path}") from None
        except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:  # numpy has no name for some dtypes
            raise PlanError(f"{path} cannot be read as a plan (truncated, or not a safetensors file): {error}") from None
        try:
            head = json.loads(metadata["hasten_plan"])
        except (KeyError, ValueError, RecursionError):
            raise PlanError(f"{path} is a safetensors file but holds no hasten plan") from None
        found = head.get("format_version") if isinstance(head, dict) else None
        if type(found) is not int or found != FORMAT_VERSION:
            raise PlanError(f"{path} has plan format version {found}, this hasten reads version {FORMAT_VERSION}")
        known = {"actions", "weights", *(f"{_CORRECTION}{site}" for site in corrections), *(f"{_TABLE}{name}" for name in tables)}
        if "actions" not in keys or keys - known or head.keys() != {"format_version", "sites", "branches", "facts", "digest"}:
            raise PlanError(f"{path} was altered: it does not hold exactly what a plan holds")
        try:
            plan = cls(np.asarray(actions), tuple(head["sites"]), tuple(head["branches"]), head["facts"], weights, corrections, tables)
        except (PlanError, TypeError, ValueError) as error:
            raise PlanError(f"{path} was altered: {error}") from None
        if plan._digest() != head["digest"]:
            raise PlanError(f"{path} was altered: its content does not match its checksum")
        return plan

    # ---------------------------------------------------------------------------------------------------- binding

    def check(self, facts: Mapping[str, Any]) -> list[str]:
        """Compares the facts the plan is bound to with those of a run, as far as both are known.

        Returns:
            Warnings: sigmas off by more than 5%, another dtype or resolution.

        Raises:
            PlanError: The model, its config, the scheduler or its order, the number of steps or the guidance layout differ.
        """
        for name in HARD_FACTS:
            if name in self.facts and name in facts and self.facts[name] != facts[name]:
                raise PlanError(f"the plan is for {name} {self.facts[name]!r}, this run has {facts[name]!r}")
        warnings = [
            f"the plan was made for {name} {self.facts[name]!r}, this run has {facts[name]!r}"
            for name in SOFT_FACTS
            if name in self.facts and name in facts and self.facts[name] != facts[name]
        ]
        if self.facts.get("sigmas") and facts.get("sigmas"):
            mine, theirs = np.asarray(self.facts["sigmas"]), np.asarray(facts["sigmas"])
            off = np.abs(mine - theirs) / np.maximum(np.abs(mine), 1e-8) if mine.shape == theirs.shape else np.ones(1)
            if off.max() > SIGMA_TOLERANCE:
                warnings.append(f"the plan's noise levels differ from this run's by up to {100 * off.max():.0f}%")
        return warnings

    # ---------------------------------------------------------------------------------------------------- looking

    def diff(self, other: Plan) -> str:
        """What differs between two plans, in lines for people; empty if nothing does."""
        mine, theirs = ({name: json.dumps(value, sort_keys=True) for name, value in plan.facts.items()} for plan in (self, other))
        lines = [
            f"{name}: {mine.get(name, 'none')} -> {theirs.get(name, 'none')}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        for what, old, new in (("sites", self.sites, other.sites), ("branches", self.branches, other.branches)):
            if old != new:
                first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
                at = " -> ".join(", ".join(names[first : first + 3]) or "none" for names in (old, new))
                lines.append(f"{what}: {len(old)} -> {len(new)}, from number {first} on {at}")
        if self.actions.shape == other.actions.shape:
            steps, sites, branches = np.nonzero(self.actions != other.actions)
            for k, s, b in zip(steps[:20], sites[:20], branches[:20], strict=True):
                was, now = (Action(p.actions[k, s, b]).name for p in (self, other))
                branch = "" if self.branches == (ALL_BRANCHES,) else f" ({self.branches[b]})"
                lines.append(f"step {k}, {self.sites[s]}{branch}: {was} -> {now}")
            if len(steps) > 20:
                lines.append(f"... and {len(steps) - 20} more of {self.actions.size} cells")
        else:
            lines.append(f"actions: {self.actions.shape} -> {other.actions.shape}")
        before, after = (np.zeros(0) if plan.weights is None else plan.weights for plan in (self, other))
        if not np.array_equal(before, after):
            lines.append("weights: other forecasts")
        return "\n".join(lines)

    def __str__(self) -> str:
        head = f"plan {self.hash}: {self.steps} steps x {len(self.sites)} sites, {100 * self.computed_fraction:.1f}% computed"
        if self.facts.get("method"):
            head += f", {self.facts['method']}"
        others = ((Action.FORECAST, ", ~ forecast"), (Action.SKIP_BRANCH, ", - one guidance branch skipped"))
        legend = "# computed, . reused" + "".join(text for action, text in others if (self.actions == action).any())
        lines = [head, f"rows are steps, columns are sites in call order; {legend}"]
        for b, name in enumerate(self.branches):
            if name != ALL_BRANCHES:
                lines.append(f"branch {name}")
            lines += [f"{k:4d} " + "".join(MARKS[cell] for cell in row) for k, row in enumerate(self.actions[:, :, b])]
        if self.sites:
            lines.append(f"     from {self.sites[0]} to {self.sites[-1]}")
        return "\n".join(lines)

    def plot(self, target: str | os.PathLike[str] | Axes | None = None, title: str | None = None) -> Axes:
        """Draws the plan as a heat map: one column a step, one row a site.

        Args:
            target: A file to write (PNG, SVG, PDF), axes to draw on, or None for new axes.
            title: Above the picture; the plan's method and its computed fraction unless told.
        """
        from matplotlib.axes import Axes as AxesType
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator

        colours = {Action.COMPUTE: "#1f5fa8", Action.REUSE: "#f2c879", Action.FORECAST: "#7fb77e", Action.SKIP_BRANCH: "#b86f9b"}
        if isinstance(target, AxesType):
            axes = target
        else:
            size = max(4.0, 0.16 * self.steps + 2), max(2.2, 0.14 * len(self.sites) * len(self.branches) + 1.4)
            axes = Figure(figsize=size, layout="constrained").subplots()
        if self.sites:
            picture = np.concatenate([self.actions[:, :, b].T for b in range(len(self.branches))])
            palette = ListedColormap(list(colours.values()))
            axes.imshow(picture, cmap=palette, vmin=0, vmax=len(colours) - 1, aspect="auto", interpolation="nearest")
        for b in range(1, len(self.branches)):
            axes.axhline(b * len(self.sites) - 0.5, color="white", linewidth=2)
        axes.set_xlabel("step")
        names = ", ".join(self.guidance_branches)
        alone = len(self.branches) == 1
        axes.set_ylabel("block" if alone else f"block, per row ({names})" if ROW in self.branches[0] else f"block, per branch ({names})")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        axes.set_title(title or f"{self.facts.get('method', 'plan')}: {100 * self.computed_fraction:.0f}% computed", fontsize=9)
        axes.legend(
            handles=[
                Patch(color=colour, label=action.name.lower()) for action, colour in colours.items() if (self.actions == action).any()
            ],
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            fontsize=7,
            frameon=False,
        )
        if isinstance(target, str | os.PathLike):
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.savefig(target, dpi=120)
        return axes
