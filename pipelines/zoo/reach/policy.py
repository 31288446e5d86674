"""A transformer diffusion policy for the `reach` world, in the manner of Diffusion Policy's DP-T (arXiv 2303.04137).

The denoiser's tokens are the waypoints of an action chunk; they attend to each other and to a memory of the noise level and of what
is observed. A chunk is drawn by 100 DDPM steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from hasten.pipelines.zoo.reach.simulator import HORIZON, OBSERVATION, SPEED, stream_of

SCALE = 0.5 * HORIZON * SPEED
"""Workspace units per unit of a normalised action: no waypoint of the expert is farther than 2, and their spread is about 0.6."""

WEIGHTS = "weights/reach"


class Attention(nn.Module):
    """Multi-head attention of tokens [B, N, width] to `memory` [B, M, width], or to themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, memory: Tensor | None = None) -> Tensor:
        source = hidden_states if memory is None else memory
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(hidden_states), self.to_k(source), self.to_v(source))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, on tokens [B, N, width]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden_states), approximate="tanh"))


class ReachBlock(nn.Module):
    """A pre-norm decoder layer: self-attention, cross-attention to the memory, feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = Attention(width, heads)
        self.cross_attn = Attention(width, heads)
        self.ffn = FeedForward(width, inner)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Tokens [B, HORIZON, width] that have read each other and the memory [B, M, width]."""
        hidden_states = hidden_states + self.self_attn(self.norm1(hidden_states))
        hidden_states = hidden_states + self.cross_attn(self.norm2(hidden_states), encoder_hidden_states)
        return hidden_states + self.ffn(self.norm3(hidden_states))


class Entity(nn.Module):
    """One token [B, ..., width] for a place relative to the effector and what else is known of it, [B, ..., 2 + extra]."""

    def __init__(self, extra: int, width: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.first = nn.Linear((2 + extra) * (1 + 2 * frequencies), width)
        self.second = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        # Sines of rising frequency: a plain linear layer would have to learn to tell close places apart.
        octaves = math.pi * 2.0 ** torch.arange(self.frequencies, device=values.device)
        waves = (values[..., None] * octaves).flatten(-2)
        features = torch.cat([values, waves.sin(), waves.cos()], -1)
        return self.second(F.silu(self.first(features.to(self.first.weight.dtype))))


class Memory(NamedTuple):
    """What a policy keeps of its observations: the same at every step of a chunk."""

    tokens: Tensor  # [B, 1 + obstacles, width] that blocks attend to
    waves: Tensor  # [width / 2] frequencies in which the noise level is told
    x: Tensor  # [B, 1, 1] the unit vector (x, y) towards the goal
    y: Tensor  # [B, 1, 2] as (y, -y)


def _turned(vectors: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Vectors [B, N, 2] in the frame of a `Memory`'s unit vector; with -y the way back.

    Not a matrix product: autocast would round the places to bfloat16.
    """
    return torch.addcmul(x * vectors, y, vectors.flip(-1))


class ReachPolicy(ModelMixin, ConfigMixin):
    """Predicts the noise in an action chunk.

    Args:
        horizon: Waypoints in a chunk.
        obstacles: Discs in an observation.
        width, heads, inner, layers: Of the decoder: channels, attention heads, channels inside the feed-forward, blocks.
        frequencies: Octaves in which places are told to the network.
    """

    _repeated_blocks = ("ReachBlock",)

    @register_to_config
    def __init__(
        self,
        horizon: int = HORIZON,
        obstacles: int = (OBSERVATION - 6) // 3,
        width: int = 96,
        heads: int = 3,
        inner: int = 192,
        layers: int = 8,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        self.width = width
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)
        self.goal = Entity(2, width, frequencies)  # the last displacement goes with the goal
        self.disc = Entity(1, width, frequencies)
        self.action_in = nn.Linear(2, width)
        self.places = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.blocks = nn.ModuleList(ReachBlock(width, heads, inner) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.action_out = nn.Linear(width, 2)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def remember(self, global_cond: Tensor) -> Memory:
        """What is the same at every step of a chunk.

        Args:
            global_cond: [B, OBSERVATION] observations, in workspace units.

        Raises:
            ValueError: The shape does not fit.
        """
        entries = 6 + 3 * self.config.obstacles
        if global_cond.ndim != 2 or global_cond.shape[1] != entries:
            raise ValueError(f"global_cond must have shape [B, {entries}], not {list(global_cond.shape)}")
        # In fp32 whatever the weights are. Everything is seen from the effector that faces the goal, so that where the scene lies and how
        # it is turned need not be learned.
        position, displacement, goal = global_cond.float()[:, None, :6].split(2, -1)
        ahead = goal - position
        x, y = (ahead / ahead.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)).split(1, -1)
        y = torch.cat([y, -y], -1)
        discs = global_cond.float()[:, 6:].unflatten(1, (-1, 3))
        token = self.goal(torch.cat([_turned(ahead, x, y), _turned(displacement, x, y) / SPEED], -1))
        around = self.disc(torch.cat([_turned(discs[..., :2] - position, x, y), discs[..., 2:]], -1))
        half = self.width // 2
        waves = torch.exp(torch.arange(half, device=global_cond.device) * (-math.log(10_000) / half))
        return Memory(torch.cat([token, around], 1), waves, x, y)

    def forward(self, sample: Tensor, timestep: Tensor | float, global_cond: Tensor, memory: Memory | None = None) -> Tensor:
        """The predicted noise.

        Args:
            sample: [B, horizon, 2] noisy normalised actions.
            timestep: Of the training schedule: a number, a scalar tensor, or [B].
            global_cond: [B, OBSERVATION] observations, in workspace units.
            memory: What `remember` returned for them; made here unless given.

        Returns:
            [B, horizon, 2], in the dtype of `sample`.

        Raises:
            ValueError: A shape does not fit.
        """
        horizon = self.config.horizon
        if sample.ndim != 3 or sample.shape[1:] != (horizon, 2):
            raise ValueError(f"sample must have shape [B, {horizon}, 2], not {list(sample.shape)}")
        if len(global_cond) != len(sample):
            entries = 6 + 3 * self.config.obstacles
            raise ValueError(f"global_cond must have shape [{len(sample)}, {entries}], not {list(global_cond.shape)}")
        dtype = self.action_in.weight.dtype
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # one for all rows is embedded once
        tokens, waves, x, y = self.remember(global_cond) if memory is None else memory
        angles = times[:, None] * waves
        time = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))))[:, None]
        seen = torch.cat([time.expand(len(sample), -1, -1), tokens], 1)
        hidden_states = self.action_in(_turned(sample.float(), x, y).to(dtype)) + self.places + time
        for block in self.blocks:
            hidden_states = block(hidden_states, seen)
        noise = self.action_out(self.norm_out(hidden_states)).float()
        return _turned(noise, x, -y).to(sample.dtype)


class Stepped(Protocol):
    """What is told which step it is; `hasten.attach` returns one."""

    def step(self, index: int, /) -> AbstractContextManager[Any]:
        """Denoiser calls inside belong to step `index`."""
        ...


def new_scheduler() -> DDPMScheduler:
    """The scheduler that the policy is trained and judged with: Diffusion Policy's, 100 steps."""
    return DDPMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", clip_sample=True, clip_sample_range=2.0
    )


@torch.no_grad()
def sample_actions(
    policy: Callable[..., Tensor],
    scheduler: Any,
    observations: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_inference_steps: int = 100,
    session: Stepped | None = None,
) -> Tensor:
    """Draws an action chunk for each observation.

        with hasten.attach(policy, method, num_inference_steps=100) as session:
            waypoints = sample_actions(policy, scheduler, observations, generator, session=session)

    Args:
        policy: A `ReachPolicy`, which embeds the observations once, or a function of sample, timestep and observations.
        scheduler: A diffusers scheduler; its `step` is given the generator.
        observations: [B, OBSERVATION], see `hasten.pipelines.zoo.reach.observe`.
        generator: One for the batch or a list of one for each row, by which a row does not depend on the others.
        num_inference_steps: Denoiser calls.
        session: Told of every step.

    Returns:
        [B, HORIZON, 2] waypoints in the workspace, float32.

    Raises:
        ValueError: The list of generators has another length than the batch.
    """
    sample = randn_tensor((len(observations), HORIZON, 2), generator=generator, device=observations.device, dtype=torch.float32)
    scheduler.set_timesteps(num_inference_steps, device=observations.device)
    known = {"memory": policy.remember(observations)} if isinstance(policy, ReachPolicy) else {}
    for i, timestep in enumerate(scheduler.timesteps):
        with nullcontext() if session is None else session.step(i):
            noise = policy(sample, timestep, observations, **known)
        sample = scheduler.step(noise, timestep, sample, generator=generator, return_dict=False)[0]
    return observations[:, None, :2].float() + SCALE * sample


class Sampler:
    """Draws chunks for `rollout`; each episode has noise of its own, so that it does not depend on its batch-mates.

    Args:
        policy, scheduler, num_inference_steps: See `sample_actions`.
        seeds: Of the episodes, in the order that `rollout` is given.
        session: Entered anew for each chunk, such as `hasten.attach(policy, method, num_inference_steps=100)`.
    """

    def __init__(
        self,
        policy: Callable[..., Tensor],
        scheduler: Any,
        seeds: Sequence[int],
        num_inference_steps: int = 100,
        session: AbstractContextManager[Stepped] | None = None,
    ) -> None:
        self.policy, self.scheduler, self.num_inference_steps, self.session = policy, scheduler, num_inference_steps, session
        self.generators = [stream_of(seed, 2) for seed in seeds]

    def __call__(self, observations: Tensor, episodes: Tensor, /) -> Tensor:
        generators = [self.generators[episode] for episode in episodes.tolist()]
        with nullcontext() if self.session is None else self.session as session:
            return sample_actions(self.policy, self.scheduler, observations, generators, self.num_inference_steps, session)


def weights_folder() -> Path:
    """The folder of the weights that ship: the network's files, `scheduler/`, the card and the measured figures.

    Raises:
        FileNotFoundError: The weights are not installed.
    """
    folder = Path(str(files("hasten.pipelines.zoo"))) / WEIGHTS
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the weights of 'reach' are missing ({folder}): reinstall hasten, or train them with recipes/reach.py")
    return folder


def load_policy(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> tuple[ReachPolicy, DDPMScheduler]:
    """The policy that ships and its scheduler.

        policy, scheduler = load_policy(torch.bfloat16)
        seeds = range(100)
        successes = rollout(Sampler(policy, scheduler, seeds), seeds)

    Args:
        dtype: Of all weights; the files hold bfloat16. Chunks are float32 in any case.
        folder: Another folder of the same kind.

    Raises:
        FileNotFoundError: The weights are not installed.
    """
    folder = folder or weights_folder()
    policy = ReachPolicy.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return policy.eval(), DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
