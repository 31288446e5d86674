"""The `reach` world: a simulator with several ways round, an expert that uses all of them, and a transformer diffusion policy."""

from hasten.pipelines.zoo.reach.policy import ReachPolicy, Sampler, load_policy, new_scheduler, sample_actions, weights_folder
from hasten.pipelines.zoo.reach.simulator import (
    HORIZON,
    LEFT,
    LIMIT,
    OBSERVATION,
    RIGHT,
    Episodes,
    Expert,
    Policy,
    Scenes,
    observe,
    passed_on,
    rollout,
    run_episodes,
    scenes_of,
    sides_of,
)

__all__ = [
    "HORIZON",
    "LEFT",
    "LIMIT",
    "OBSERVATION",
    "RIGHT",
    "Episodes",
    "Expert",
    "Policy",
    "ReachPolicy",
    "Sampler",
    "Scenes",
    "load_policy",
    "new_scheduler",
    "observe",
    "passed_on",
    "rollout",
    "run_episodes",
    "sample_actions",
    "scenes_of",
    "sides_of",
    "weights_folder",
]
