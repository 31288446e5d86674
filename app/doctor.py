"""`hasten doctor`: what is here, what is missing, and what to install for it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hasten._version import __version__
from hasten.app.errors import FAILURE, OK
from hasten.app.output import Outcome, table
from hasten.pipelines.zoo import loading

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow", "typer", "rich", "matplotlib")
EXTRAS = {
    "demo": (("gradio",), "the browser demo"),
    "xformers": (("xformers",), "xformers' attention kernels"),
    "train": (("peft",), "LoRA and distillation"),
    "quant": (("torchao",), "int8 and int4 weights"),
    "bench": (("psutil", "cache_dit", "DeepCache"), "other projects beside ours in the benchmarks"),
    "dev": (("pytest", "hypothesis", "ruff", "mypy"), "tests and linting"),
}


@dataclass(frozen=True)
class Finding:
    """One line: `state` is "ok", "absent" (optional, with what to do) or "problem" (with what to do)."""

    part: str
    name: str
    state: str
    detail: str


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def wanted_ranges() -> dict[str, str]:
    """Version ranges that hasten's own metadata asks for, by package; empty in a checkout that is not installed."""
    try:
        requirements = metadata.requires("hasten") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)\s*([^;]*)", line) for line in requirements if "extra ==" not in line)
    return {match[1].lower(): match[2].strip() for match in found if match is not None}


def within(version: str, wanted: str) -> bool:
    """Whether a version satisfies a range such as '>=2.10,<3'; only the operators that pyproject.toml uses are known."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])

    compare = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}
    clauses = re.findall(r"(>=|==|<)\s*([\d.]+)", wanted)
    return all(compare[sign](numbers(version), numbers(bound)) for sign, bound in clauses)


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    findings = [
        Finding("system", "hasten", "ok", __version__),
        Finding("system", "python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)} ({platform.machine()})"),
    ]
    ranges = wanted_ranges()
    for package in REQUIRED:
        version, wanted = version_of(package), ranges.get(package, "")
        if version is None:
            findings.append(Finding("packages", package, "problem", f"not installed: pip install '{package}{wanted}'"))
        elif not within(version, wanted):
            findings.append(
                Finding("packages", package, "problem", f"{version}, but hasten needs {wanted}: pip install '{package}{wanted}'")
            )
        else:
            findings.append(Finding("packages", package, "ok", version))
    findings += _devices()
    for extra, (packages, purpose) in EXTRAS.items():
        versions = {package: version_of(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        have = ", ".join(f"{package} {version}" for package, version in versions.items() if version is not None)
        if missing:
            findings.append(Finding("extras", extra, "absent", f"{purpose}: pip install 'hasten[{extra}]' (lacks {', '.join(missing)})"))
        else:
            findings.append(Finding("extras", extra, "ok", f"{purpose}: {have}"))
    for name in loading.MODELS:
        try:
            folder = loading.path_of(name)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            findings.append(Finding("models", name, "ok", f"{size / 1e6:.1f} MB in {folder}"))
        except FileNotFoundError as error:
            findings.append(Finding("models", name, "problem", str(error)))
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    findings.append(
        Finding("models", "hub", "ok", "offline (HF_HUB_OFFLINE)" if offline else "downloads allowed; HF_HUB_OFFLINE=1 forbids them")
    )
    return findings


def _devices() -> list[Finding]:
    if version_of("torch") is None:
        return []
    import torch

    from hasten.kernels.nvrtc import find_nvrtc

    cores = os.cpu_count() or 1
    found = [Finding("devices", "cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads for torch (OMP_NUM_THREADS sets them)")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            detail = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}, CUDA {torch.version.cuda}"
            found.append(Finding("devices", f"cuda:{index}", "ok", detail))
    elif torch.version.cuda is None:
        found.append(
            Finding("devices", "cuda", "absent", "this torch has no CUDA; pytorch.org/get-started says how to install one that has")
        )
    else:
        found.append(Finding("devices", "cuda", "absent", f"torch has CUDA {torch.version.cuda}, but no device or driver was found"))
    if torch.backends.mps.is_available():
        found.append(Finding("devices", "mps", "ok", "Apple GPU"))
    nvrtc = find_nvrtc()
    if nvrtc is not None:
        found.append(Finding("kernels", "nvrtc", "ok", str(nvrtc)))
    else:
        found.append(
            Finding(
                "kernels",
                "nvrtc",
                "absent",
                "comes with torch's CUDA wheels; without it CUDA kernels cannot be compiled, elsewhere PyTorch is used",
            )
        )
    return found


def doctor() -> Outcome:
    """Everything, for people and for machines; exit code 1 where something that hasten needs is missing."""
    findings = examine()
    parts: dict[str, Any] = {}
    for finding in findings:
        parts.setdefault(finding.part, {})[finding.name] = {"state": finding.state, "detail": finding.detail}
    problems = [finding for finding in findings if finding.state == "problem"]
    marks = {"ok": " ", "absent": "-", "problem": "!"}
    rows = [(marks[finding.state], finding.part if finding.part != before else "", finding.name, finding.detail)
            for before, finding in zip(["", *(f.part for f in findings)], findings, strict=False)]  # fmt: skip
    verdict = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, marked !" if problems else "all that hasten needs is here"
    text = f"{table(rows, numbers=False)}\n\n{verdict}; - marks what is optional and absent"
    return Outcome({"ok": not problems, **parts}, text, FAILURE if problems else OK)
